# make venv: the environment, in .venv     make demo: compress the demo checkpoint, end to end
# make test: the test suite                make lint: ruff and pyright
#
# PYTHON: the interpreter that makes the environment (3.11 or later).
# TORCH_INDEX: a package index to take torch from, such as PyTorch's own index of CPU builds; see CONTRIBUTING.md.
# JOBS: test processes.

PYTHON ?= python3
TORCH_INDEX ?=
JOBS ?= 2

BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: venv demo test lint

venv: $(STAMP)

# torch goes first, so that nothing else decides which build of it is taken.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: venv
	$(BIN)/circuitpress run recipes/quickstart.yaml

# One thread a process: the checkpoints of the tests are too small to share out.
test: venv
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
