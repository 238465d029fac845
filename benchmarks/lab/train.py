"""Trains a small Llama from plain text: makes checkpoints such as recipes/demo/checkpoint.

1. A byte-level BPE tokenizer is trained on the text (`<|endoftext|>`, id 0, ends a document; no BOS).
2. The text is tokenised piece by piece into a file of token ids, which is mapped and never read as a whole.
3. Each epoch is a seeded permutation of the windows: a batch depends on seed and step, a loader has no state to save.
4. AdamW on float32 weights, the forward and backward pass in bfloat16 (autocast), a linear warm-up and a cosine decay,
   clipped gradients; weights, moments and step are saved every `--save-every` steps as one safetensors file.
5. The result is an ordinary Hugging Face folder in bfloat16.

Running the same command again continues from the last saved step and, on the same machine, gives the same bytes as a
run that was never stopped. To start over, delete the folder.

  python benchmarks/lab/train.py train.txt --out lab-3m --hidden 192 --blocks 4 --heads 3 --kv-heads 1 --neurons 512
  python benchmarks/lab/train.py train.txt --out demo --batch 64 --steps 1757
"""

import argparse
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from circuitpress.files import atomic, write_bytes_atomic

log = logging.getLogger("train")

END = "<|endoftext|>"
_PIECE = 1 << 20  # characters tokenised at a time: about 1 s of work and 30 MB of memory


def _option(default: float | str, about: str) -> Any:
    return field(default=default, metadata={"help": about})


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result; each field is an option of the command line."""

    vocab: int = _option(4096, "size of the vocabulary")
    hidden: int = _option(256, "width")
    blocks: int = _option(6, "decoder blocks")
    heads: int = _option(4, "query heads; their size is hidden / heads")
    kv_heads: int = _option(2, "key-value heads")
    neurons: int = _option(704, "neurons of each MLP")
    window: int = _option(256, "tokens of a training window")
    positions: int = _option(512, "max_position_embeddings of the checkpoint")
    batch: int = _option(32, "windows a step")
    steps: int = _option(1000, "optimizer steps")
    lr: float = _option(2e-3, "peak learning rate")
    warmup: int = _option(100, "steps of linear warm-up")
    floor: float = _option(0.03, "last learning rate, as a fraction of the peak")
    weight_decay: float = _option(0.1, "weight decay of matrices (norms have none)")
    clip: float = _option(1.0, "largest gradient norm")
    seed: int = _option(0, "seed of the weights and of the order of windows")
    device: str = _option("auto", "cpu, cuda or auto")


def pieces(texts: Sequence[Path]) -> Iterator[str]:
    """The text of all files in pieces of whole lines, without the line break after `<|endoftext|>`."""
    for path in texts:
        with path.open(encoding="utf-8") as stream:
            while lines := stream.readlines(_PIECE):
                yield "".join(lines).replace(f"{END}\n", END)


def train_tokenizer(texts: Sequence[Path], vocab: int) -> Tokenizer:
    """A byte-level BPE tokenizer of `vocab` entries (256 bytes, `<|endoftext|>` and merges)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(pieces(texts), trainer)
    return tokenizer


def tokenise(texts: Sequence[Path], tokenizer: Tokenizer, path: Path) -> None:
    """Writes the ids of the text to `path`, 4 bytes each."""
    with atomic(path) as partial, partial.open("wb") as stream:
        for piece in pieces(texts):
            stream.write(np.array(tokenizer.encode(piece).ids, dtype=np.uint32).tobytes())


class Windows:
    """The mapped token file as windows of `length`; `batch(step)` depends on nothing but the seed."""

    def __init__(self, path: Path, *, length: int, size: int, seed: int) -> None:
        tokens = np.memmap(path, dtype=np.uint32, mode="r")
        self.count = len(tokens) // length
        if self.count == 0:
            raise SystemExit(f"{path} holds {len(tokens)} tokens, fewer than one window of {length}: give more text")
        self._windows = tokens[: self.count * length].reshape(self.count, length)
        self._size = size
        self._order = lru_cache(maxsize=2)(lambda epoch: np.random.default_rng((seed, epoch)).permutation(self.count))

    def batch(self, step: int) -> Tensor:
        """The windows of a step (from 0): [size, length] int64; an epoch ends where it ends, also inside a batch."""
        places = range(step * self._size, (step + 1) * self._size)
        rows: NDArray[np.int64] = np.array([self._order(place // self.count)[place % self.count] for place in places])
        return torch.from_numpy(self._windows[rows].astype(np.int64))


def build_model(settings: Settings, vocab: int) -> LlamaForCausalLM:
    """A float32 model with seeded random weights and tied embeddings."""
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=settings.hidden,
        intermediate_size=settings.neurons,
        num_hidden_layers=settings.blocks,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.positions,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def build_optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW (0.9, 0.95) that decays matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def learning_rate(step: int, settings: Settings) -> float:
    """Linear from 0 over `warmup` steps, then a half cosine down to `floor` of the peak at the last step."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.lr * (settings.floor + (1 - settings.floor) * 0.5 * (1 + math.cos(math.pi * done)))


def save_state(path: Path, model: nn.Module, optimizer: torch.optim.AdamW, step: int) -> None:
    """Writes the weights, both moments of each and the number of steps done."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        moments = optimizer.state[parameter]
        tensors |= {f"weight.{name}": parameter.detach()}
        tensors |= {f"{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq", "step")}
    with atomic(path) as partial:
        save_file(tensors, partial, metadata={"step": str(step)})


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.AdamW) -> int:
    """The inverse of `save_state`, into `model` and `optimizer`; returns the number of steps done."""
    with safe_open(path, framework="pt") as file:
        for name, parameter in model.named_parameters():
            with torch.no_grad():
                parameter.copy_(file.get_tensor(f"weight.{name}"))
            moments = {key: file.get_tensor(f"{key}.{name}").to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = moments | {"step": file.get_tensor(f"step.{name}")}
        return int(file.metadata()["step"])


def train(
    texts: Sequence[Path],
    out: Path,
    settings: Settings,
    *,
    save_every: int = 100,
    advance: Callable[[int, float], object] = lambda *_: None,
) -> None:
    """Trains, or goes on training, and writes the checkpoint to `out`; after each step `advance(steps done, loss)`."""
    work = out / "training"
    sources = {path.name: path.stat().st_size for path in texts}
    asked = json.dumps({"texts": sources, "settings": asdict(settings)}, indent=1) + "\n"
    record = work / "settings.json"
    if record.exists() and record.read_text() != asked:
        raise SystemExit(f"{out} was begun with other settings or text ({record}): use them, or another --out")
    write_bytes_atomic(record, asked.encode())

    if not (work / "tokens.bin").exists():
        log.info("training the tokenizer")
        tokenizer = train_tokenizer(texts, settings.vocab)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)
        fast.model_max_length = settings.positions
        fast.save_pretrained(out)
        tokenise(texts, tokenizer, work / "tokens.bin")
    vocab = Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab_size()
    windows = Windows(work / "tokens.bin", length=settings.window, size=settings.batch, seed=settings.seed)

    cuda = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if cuda else "cpu")
    model = build_model(settings, vocab)
    nn.Module.to(model, device)  # in place; built on the CPU, so that the seed gives the same weights everywhere
    optimizer = build_optimizer(model, settings)
    state = work / "state.safetensors"
    start = load_state(state, model, optimizer) if state.exists() else 0
    log.info("%d windows, %d parameters, from step %d", windows.count, model.num_parameters(), start)

    for step in range(start, settings.steps):
        ids = windows.batch(step).to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % save_every == 0 or step + 1 == settings.steps:
            save_state(state, model, optimizer, step + 1)
        advance(step + 1, loss.item())
    model.bfloat16().save_pretrained(out)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: one option for each field of `Settings`."""
    about, examples = (__doc__ or "").split("\n\n  python", 1)
    parser = argparse.ArgumentParser(description=about, epilog=f"examples:\n  python{examples}")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("texts", nargs="+", type=Path, help=f"UTF-8 text; a line {END} ends a document")
    parser.add_argument("--out", required=True, type=Path, help="the folder of the checkpoint")
    parser.add_argument("--save-every", type=int, default=100, help="steps between two saved states (100)")
    for option in fields(Settings):
        flag, default = f"--{option.name.replace('_', '-')}", option.default
        parser.add_argument(flag, type=type(default), default=default, help=f"{option.metadata['help']} ({default})")
    chosen = vars(parser.parse_args(arguments))
    texts, out, save_every = chosen.pop("texts"), chosen.pop("out"), chosen.pop("save_every")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)

    def advance(step: int, loss: float) -> None:
        if step % 20 == 0 or step == chosen["steps"]:
            log.info("step %d of %d, loss %.4f", step, chosen["steps"], loss)

    train(texts, out, Settings(**chosen), save_every=save_every, advance=advance)


if __name__ == "__main__":
    main()
