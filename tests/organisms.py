"""Models with known circuits: an induction circuit compiled by hand, and trained Llamas on synthetic IOI.

`compiled_induction` sets the weights of an ordinary GPT-2 so that L0.head.1 copies the previous token and L1.head.2
looks for the current token among those copies. One-hot subspaces keep what is written apart:

    TOK (20) | POS (24) | PRV: the previous token (20) | OUT: the prediction (20) | JUNK (12)

Four distractor heads and both MLPs attend and write loudly, but to JUNK alone, which nothing reads; L0.head.2 and
L1.head.1 have no weights at all. So importance by size ranks the four distractors first, and importance by effect the
two heads of the circuit.

`ioi` loads the script that trained the checkpoints in tests/data/ioi, for its prompts.
"""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from circuitpress.behaviors import Behavior, Pairs
from circuitpress.units import UnitId

from .scripts import load_script

TOKENS, POSITIONS, HEADS, WIDTH = 20, 24, 4, 24
TOK, POS = slice(0, 20), slice(20, 44)
PRV, OUT, JUNK = slice(44, 64), slice(64, 84), slice(84, 96)
CIRCUIT = {UnitId(0, "head", 1), UnitId(1, "head", 2)}
DISTRACTORS = {UnitId(0, "head", 0), UnitId(0, "head", 3), UnitId(1, "head", 0), UnitId(1, "head", 3)}
EMPTY = {UnitId(0, "head", 2), UnitId(1, "head", 1)}
SEEDS = (0, 1, 2, 3)
DATA = Path(__file__).parent / "data" / "ioi"


def compiled_induction(folder: Path) -> Path:
    """Writes the compiled model to `folder`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=TOKENS, n_positions=POSITIONS, n_embd=HEADS * WIDTH, n_layer=2, n_head=HEADS, n_inner=64,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, dtype="float32",
    )  # fmt: skip
    model: Any = GPT2LMHeadModel(config).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        body = model.transformer
        for norm in [body.ln_f, *(norm for block in body.h for norm in (block.ln_1, block.ln_2))]:
            norm.weight.fill_(1.0)
        body.wte.weight[:, TOK] = torch.eye(TOKENS)
        body.wpe.weight[:, POS] = torch.eye(POSITIONS)
        # The head of the previous position: query p meets key p - 1; position 0 has none.
        q, k, v, o = _parts()
        q[POS] = 6 * torch.roll(torch.eye(POSITIONS), -1, 1)
        q[POS.start] = 0
        k[POS] = 6 * torch.eye(POSITIONS)
        v[TOK, :TOKENS] = torch.eye(TOKENS)
        o[:TOKENS, PRV] = torch.eye(TOKENS)
        _set_head(body.h[0], 1, q, k, v, o)
        # The induction head: query "my token" meets key "my previous token".
        q, k, v, o = _parts()
        q[TOK, :TOKENS] = 6 * torch.eye(TOKENS)
        k[PRV, :TOKENS] = 12 * torch.eye(TOKENS)
        v[TOK, :TOKENS] = 8 * torch.eye(TOKENS)
        o[:TOKENS, OUT] = torch.eye(TOKENS)
        _set_head(body.h[1], 2, q, k, v, o)
        for unit in sorted(DISTRACTORS):
            q, k, v = (0.5 * torch.randn(HEADS * WIDTH, WIDTH, generator=draw) for _ in range(3))
            o = torch.zeros(WIDTH, HEADS * WIDTH)
            o[:, JUNK] = 0.12 * torch.randn(WIDTH, 12, generator=draw)
            _set_head(body.h[unit.layer], unit.index, q, k, v, o)
        for block in body.h:
            block.mlp.c_fc.weight.copy_(0.3 * torch.randn(HEADS * WIDTH, 64, generator=draw))
            block.mlp.c_proj.weight[:, JUNK] = 0.1 * torch.randn(64, 12, generator=draw)
        model.lm_head.weight[:, OUT] = 10 * torch.eye(TOKENS)
    model.save_pretrained(folder)
    return folder


def compiled_with_words(folder: Path) -> Path:
    """The compiled model with a tokenizer of its twenty words, and 20 of its prompts in task.jsonl."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    compiled_induction(folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(TOKENS)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    pairs = repeated_tokens(20).pairs
    assert isinstance(pairs, Pairs)
    rows = []
    for row in range(len(pairs)):
        stop = int(pairs.position[row]) + 1
        clean, corrupted = (
            " ".join(f"t{i}" for i in ids[row, :stop].tolist()) for ids in (pairs.clean, pairs.corrupted)
        )
        answer, wrong = f" t{pairs.answer[row]}", f" t{pairs.wrong[row]}"
        rows.append(json.dumps({"clean": clean, "corrupted": corrupted, "answer": answer, "wrong": wrong}))
    (folder / "task.jsonl").write_text("\n".join(rows))
    return folder


def _parts() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = (torch.zeros(HEADS * WIDTH, WIDTH) for _ in range(3))
    return q, k, v, torch.zeros(WIDTH, HEADS * WIDTH)


def _set_head(block: Any, head: int, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> None:
    """Conv1D stores [inputs, outputs]."""
    for part, value in enumerate((q, k, v)):
        start = part * HEADS * WIDTH + head * WIDTH
        block.attn.c_attn.weight[:, start : start + WIDTH] = value
    block.attn.c_proj.weight[head * WIDTH : (head + 1) * WIDTH] = o


def repeated_tokens(n: int = 48, seed: int = 0) -> Behavior:
    """Ten distinct tokens and the first few of them again; corrupted, the one that asks and a later one have changed
    places in the first part."""
    draw = torch.Generator().manual_seed(seed)
    first = torch.rand(n, TOKENS, generator=draw).argsort(1)[:, :10]
    other, rows = first.clone(), torch.arange(n)
    k = torch.randint(2, 5, (n,), generator=draw)
    c = torch.randint(6, 9, (n,), generator=draw)
    other[rows, k], other[rows, c] = first[rows, c], first[rows, k]
    clean, corrupted = torch.zeros(n, 15, dtype=torch.int64), torch.zeros(n, 15, dtype=torch.int64)
    for row in range(n):
        again = first[row, : k[row] + 1]
        for ids, start in ((clean, first[row]), (corrupted, other[row])):
            ids[row, : 11 + k[row]] = torch.cat([start, again])
    pairs = Pairs(clean, corrupted, 10 + k, first[rows, k + 1], first[rows, c + 1])
    return Behavior("induction", "logit_diff", pairs)


def ioi() -> ModuleType:
    """benchmarks/lab/ioi.py as a module (benchmarks/ is no package)."""
    return load_script("benchmarks/lab/ioi.py")


def parts(layers: int, heads: int, neurons: int) -> dict[str, tuple[UnitId, ...]]:
    """Every head, and every MLP as the set of its neurons."""
    found = {f"L{i}H{h}": (UnitId(i, "head", h),) for i in range(layers) for h in range(heads)}
    return found | {f"M{i}": tuple(UnitId(i, "neuron", n) for n in range(neurons)) for i in range(layers)}
