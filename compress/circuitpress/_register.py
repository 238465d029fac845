"""Lets transformers load our checkpoints after a bare `import circuitpress`, without importing transformers to say so.

1. If transformers' quantizer registry is loaded already, the registration is made at once.
2. If not, a finder waits at the head of `sys.meta_path` for that one package and registers right after it has run.

Why not simply import transformers here: with torch it costs two seconds, and every `circuitpress --help` passes through
this package. Why the package `transformers.quantizers` and not its module `auto`: once the package has run, all of it
can be imported, so the registration never sees a half-made module.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_REGISTRY = "transformers.quantizers"


def register_with_transformers() -> None:
    """Registers the `circuitpress` quantization method with transformers: now, or when transformers is imported."""
    if _REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _register() -> None:
    from .runtime import hf

    hf.register()


class _Waiting(MetaPathFinder):
    """Finds nothing itself: sees the registry's import coming, steps aside and adds one call to its end."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        del path, target
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register()

            spec.loader.exec_module = run_and_register
        return spec
