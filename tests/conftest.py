"""What all tests share: run-time type checks of the library, and tiny checkpoints of every supported family.

The checkpoints have random weights, large enough (std 0.2) that logits differ by nats, and sizes that divide nothing
evenly: widths that are no multiple of 16 or of a group, rows of q that are not the hidden size, vocabularies of 97.
"""

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from beartype import BeartypeConf, BeartypeDecorPlace
from beartype.claw import beartype_packages

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_KERNELS = Path(__file__).parents[1] / "kernels" / "circuitpress_kernels"

# Every function of the library is checked against its annotations; a float may be given as an int, as PEP 484 says. The
# check goes below other decorators, so that a torch operator stays one; Triton compiles the source of its kernels and
# takes no decorator but its own.
beartype_packages(
    ("circuitpress", "circuitpress_kernels"),
    conf=BeartypeConf(
        is_pep484_tower=True,
        claw_decor_place_func=BeartypeDecorPlace.FIRST,
        claw_skip_package_names=tuple(f"circuitpress_kernels.{path.stem}" for path in _KERNELS.glob("*_triton.py")),
    ),
)

VOCAB = 97
END = "<|endoftext|>"
_WORDS = """the a small old quiet river boat house garden king girl doctor letter morning winter road light stone
door window bird tree sea ship night star hand voice went saw heard found gave took kept left came down over under
through before after with without and but because when while never always slowly gladly"""

Build = Callable[[str, "PretrainedConfig"], Path]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects the tests marked `gpu` where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=marked)
        items[:] = [item for item in items if item not in marked]


@pytest.fixture(autouse=True)
def _torch_settings() -> Iterator[None]:
    """Puts torch's default type, gradient mode and thread count back after each test."""
    torch: Any = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    yield
    torch.set_default_dtype(before[0])
    torch.set_grad_enabled(before[1])
    if torch.get_num_threads() != before[2]:
        torch.set_num_threads(before[2])


@pytest.fixture(scope="session")
def text() -> str:
    """About 40 kB of made-up English: one paragraph a line, a line `<|endoftext|>` after every seventh."""
    draw = random.Random(0)
    words, lines = _WORDS.split(), []
    for number in range(1, 161):
        sentences = [" ".join(draw.choices(words, k=draw.randint(4, 12))) for _ in range(draw.randint(3, 8))]
        lines.append(" ".join(f"{sentence.capitalize()}." for sentence in sentences))
        if number % 7 == 0:
            lines.append(END)
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def text_file(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made-up English in a file."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text)
    return path


@pytest.fixture(scope="session")
def build_checkpoint(text: str, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """`build(name, config)` -> a folder with config.json, model.safetensors and a real tokenizer; seeded."""

    def build(name: str, config: "PretrainedConfig") -> Path:
        import torch
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

        folder = tmp_path_factory.mktemp(name)
        with torch.random.fork_rng():
            torch.manual_seed(sum(name.encode()))
            model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 1:  # norms start at 1 and biases at 0, which would hide mistakes in both
                        parameter += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=_train_tokenizer(text), eos_token=END)
        tokenizer.save_pretrained(folder)
        return folder

    return build


@pytest.fixture(scope="session")
def tiny_llama(build_checkpoint: Build) -> Path:
    """Llama, float32, untied: hidden 48, 3 blocks, 6 heads on 3 KV heads of 8, 52 neurons."""
    from transformers import LlamaConfig

    return build_checkpoint("llama", LlamaConfig(**_sizes(48, 52, heads=6, kv_heads=3, head_dim=8, blocks=3)))


@pytest.fixture(scope="session")
def tiny_mistral(build_checkpoint: Build) -> Path:
    """Mistral, bfloat16, untied: hidden 40, 2 blocks, 4 heads on 2 KV heads of 6, 50 neurons."""
    from transformers import MistralConfig

    sizes = _sizes(40, 50, heads=4, kv_heads=2, head_dim=6, blocks=2)
    return build_checkpoint("mistral", MistralConfig(**sizes | {"dtype": "bfloat16"}, sliding_window=None))


@pytest.fixture(scope="session")
def tiny_qwen2(build_checkpoint: Build) -> Path:
    """Qwen2, float32, tied, biases on q, k and v: hidden 36, 2 blocks, 3 heads on 1 KV head of 12, 44 neurons."""
    from transformers import Qwen2Config

    sizes = _sizes(36, 44, heads=3, kv_heads=1, head_dim=12, blocks=2)
    return build_checkpoint("qwen2", Qwen2Config(**sizes | {"tie_word_embeddings": True}))


@pytest.fixture(scope="session")
def tiny_qwen3(build_checkpoint: Build) -> Path:
    """Qwen3, bfloat16, tied, norms on q and k: hidden 48, 2 blocks, 4 heads on 2 KV heads of 10, 56 neurons."""
    from transformers import Qwen3Config

    sizes = _sizes(48, 56, heads=4, kv_heads=2, head_dim=10, blocks=2)
    return build_checkpoint("qwen3", Qwen3Config(**sizes | {"tie_word_embeddings": True, "dtype": "bfloat16"}))


@pytest.fixture(scope="session")
def tiny_gpt2(build_checkpoint: Build) -> Path:
    """GPT-2, float32, tied, Conv1D with biases: hidden 40, 3 blocks, 5 heads of 8, 52 neurons, 64 positions."""
    from transformers import GPT2Config

    sizes: dict[str, Any] = {"n_embd": 40, "n_layer": 3, "n_head": 5, "n_inner": 52, "n_positions": 64}
    common: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "dtype": "float32"}
    return build_checkpoint("gpt2", GPT2Config(vocab_size=VOCAB, initializer_range=0.2, **sizes, **common))


def _sizes(hidden: int, neurons: int, *, heads: int, kv_heads: int, head_dim: int, blocks: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": neurons,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": "float32",
    }


def _train_tokenizer(text: str) -> Any:
    """A byte-level BPE tokenizer with the end mark as id 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[END], show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer
