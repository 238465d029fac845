"""What llama.cpp makes of a plan: exported, converted, quantized by the printed commands, and measured by llama.cpp.

For every run (planned with `plan.target: gguf`):

1. The two commands that `circuitpress export --format gguf` prints are run as they are, in llama.cpp's folder. Every
   tensor of the file must have the planned type and bytes.
2. llama.cpp's own mixtures (Q2_K, Q3_K_M, Q4_K_M) are made of the same floating file, with our importance matrix and
   with none, embedding and lm_head as floating as in ours.
3. `llama-perplexity` computes the reference's probabilities from the float32 model on a text, then the divergence of
   every file from them (in the second half of each window, which is its habit). So each file is judged as it runs:
   llama.cpp's kernels for K-quants round activations to 8 bits.
4. The same tokens again without llama.cpp's arithmetic: weights decoded by the package gguf, in transformers, compared
   by our evaluator. The same for the float32 model, and for the formats that stand in for llama.cpp's in the run.

The runs of llama-cpp.json: 64 windows of 256 tokens to calibrate on, `score.exact: 0`, `plan.probes: []`, and in
`plan.formats` the six that stand in for types and the floating one; budgets are those of the mixtures.

llama.cpp comes from PyPI, with what its scripts need: see docs/serve-elsewhere.md.

    python benchmarks/llama_cpp.py --run RUN [--run ...] --llama-cpp SOURCE --build SOURCE/build [--text FILE]
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from circuitpress.anatomy import Anatomy, read_anatomy
from circuitpress.console import Console
from circuitpress.evaluate.divergence import Divergence, Tally
from circuitpress.export.gguf import IMATRIX, tensor_name
from circuitpress.recipe import Recipe
from circuitpress.run.exporting import export_model
from common import load_rows, save_results

MIXTURES = ("Q2_K", "Q3_K_M", "Q4_K_M")
_PATH = click.Path(path_type=Path, exists=True)


@dataclass(frozen=True)
class Tools:
    """llama.cpp: its sources, the folder of its programs, and a `python` for its scripts."""

    source: Path
    programs: Path
    python: Path

    def run(self, command: list[str]) -> str:
        """What a command says, run in llama.cpp's folder."""
        path = os.pathsep.join([str(self.programs), str(self.python.parent), os.environ["PATH"]])
        done = subprocess.run(
            command, cwd=self.source, env=os.environ | {"PATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise click.ClickException(f"{shlex.join(command)}\n{done.stdout[-2000:]}")
        return done.stdout

    def measure(self, model: Path, *options: str, pattern: str) -> tuple[float, ...]:
        """The numbers that `pattern` finds in what llama-perplexity says of a GGUF file.

        Its log is printed by a thread that its end does not wait for: about one time in twelve the last lines, which
        are the result, are missing. Then it is asked again.
        """
        command = ["llama-perplexity", "-m", str(model), "-t", str(torch.get_num_threads()), *options]
        said = ""
        for _ in range(9):
            said = self.run(command)
            if found := re.search(pattern, said, re.DOTALL):
                return tuple(float(number) for number in found.groups())
        raise click.ClickException(f"{shlex.join(command)} does not say {pattern}:\n{said[-2000:]}")


@dataclass(frozen=True)
class Reference:
    """The original: its float32 file, what llama.cpp made of the text, and transformers' logits there."""

    gguf: Path
    probabilities: Path
    ids: Tensor
    logits: Tensor


@click.command()
@click.option("--run", "runs", type=_PATH, multiple=True, required=True, help="folder of a run for gguf")
@click.option("--llama-cpp", "source", type=_PATH, required=True, help="sources of llama.cpp")
@click.option("--build", type=_PATH, required=True, help="where it was built: bin/llama-quantize, bin/llama-perplexity")
@click.option(
    "--python", type=_PATH, default=sys.executable, help="interpreter for convert_hf_to_gguf.py; default: this"
)
@click.option("--text", type=_PATH, help="text to measure on; default: the run's own test text")
@click.option("--windows", default=32, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/llama-cpp.json"))
def main(
    runs: tuple[Path, ...], source: Path, build: Path, python: Path, text: Path | None, windows: int, out: Path
) -> None:
    """Measures every run and llama.cpp's own mixtures; rows of other checkpoints in --out stay."""
    logging.disable_progress_bar()
    tools = Tools(source.resolve(), (build / "bin").resolve(), python.absolute())
    names = {Path(str(Recipe.load(run / "recipe.yaml").model)).name for run in runs}
    rows = [row for row in load_rows(out) if row["checkpoint"] not in names]
    for run in runs:
        recipe = Recipe.load(run / "recipe.yaml")
        tested = text or recipe.data.test
        if tested is None:
            raise click.UsageError(f"{run} has no test text: pass --text")
        checkpoint = Path(str(recipe.model)).name
        mixtures = () if any(row["checkpoint"] == checkpoint for row in rows) else MIXTURES
        with tempfile.TemporaryDirectory() as scratch:
            found = _measure(run, tested.resolve(), windows, recipe.data.length, mixtures, tools, Path(scratch))
        for row in found:
            rows.append({"checkpoint": checkpoint} | row)
            click.echo(json.dumps(rows[-1]))
        save_results(out, rows, consumer=_versions(tools))


def _measure(
    run: Path, text: Path, windows: int, length: int, mixtures: tuple[str, ...], tools: Tools, scratch: Path
) -> list[dict[str, Any]]:
    export = scratch / "export"
    _, document = export_model(run / "model", "gguf", export, Console(quiet=True))
    convert, quantize = (shlex.split(line) for line in document["commands"])
    tools.run(convert)
    tools.run(quantize)
    anatomy = read_anatomy(export)
    _check_promise(anatomy, export / "model.gguf", document)

    *_, flag, _ = convert
    assert flag == "--outtype"
    tools.run([*convert[:-3], str(scratch / "float32.gguf"), "--outtype", "f32"])
    reference, first = _reference(tools, export, scratch, text, windows, length)
    rows = [first] if mixtures else []
    orders = _orders(anatomy, export, reference.gguf)

    def judged(method: str, path: Path, *, importance: bool | None) -> dict[str, Any]:
        weights = _decoded(anatomy, path, orders)
        return (
            {"method": method, "importance": importance}
            | _sizes(anatomy, path)
            | _by_llama_cpp(tools, reference, path)
            | {"decoded": _divergence(reference, _logits(export, reference.ids, weights))}
        )

    stand_ins = _divergence(reference, _logits(run / "model", reference.ids))
    rows.append(judged("plan", export / "model.gguf", importance=True) | {"stand_ins": stand_ins})
    at = quantize.index("--imatrix")
    tools.run(quantize[:at] + quantize[at + 2 :])
    rows.append(judged("plan", export / "model.gguf", importance=False))
    *options, model, packed, _ = quantize
    if mixtures:
        rows.append(judged("unrounded", Path(model), importance=None))
    keep = options[options.index("--token-embedding-type") :]
    for name in mixtures:
        for told in (["--imatrix", str(export / IMATRIX)], []):
            tools.run(["llama-quantize", *told, *keep, model, packed, name])
            rows.append(judged(name, Path(packed), importance=bool(told)))
    return rows


def _check_promise(anatomy: Anatomy, path: Path, document: Mapping[str, Any]) -> None:
    """ClickException unless every matrix of the blocks has the type and the bytes of the plan."""
    matrices = _matrices(anatomy, path)
    types = {name: tensor.tensor_type.name.lower() for name, tensor in matrices.items()}
    wrong = {name: kind for name, kind in types.items() if document["types"][name] != kind}
    nbytes = sum(int(tensor.n_bytes) for tensor in matrices.values())
    if wrong or nbytes != document["linear_bytes"]:
        raise click.ClickException(f"not as planned: {wrong}, {nbytes:,} bytes for {document['linear_bytes']:,}")


def _matrices(anatomy: Anatomy, path: Path) -> dict[str, Any]:
    """The matrices of the decoder blocks in a GGUF file by their names there."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    return {name: tensors[name] for b in anatomy.blocks for m in b.matrices for name in [tensor_name(b.index, m)]}


def _sizes(anatomy: Anatomy, path: Path) -> dict[str, Any]:
    matrices = _matrices(anatomy, path).values()
    nbytes = sum(int(tensor.n_bytes) for tensor in matrices)
    return {
        "bits_per_weight": 8 * nbytes / sum(int(tensor.n_elements) for tensor in matrices),
        "linear_bytes": nbytes,
        "file_bytes": path.stat().st_size,
        "types": dict(Counter(tensor.tensor_type.name for tensor in matrices).most_common()),
    }


def _reference(
    tools: Tools, model: Path, scratch: Path, text: Path, windows: int, length: int
) -> tuple[Reference, dict[str, Any]]:
    """The reference, and a row: does llama.cpp's float32 model compute what transformers does?"""
    packed, probabilities = scratch / "float32.gguf", scratch / "probabilities.bin"
    (perplexity,) = tools.measure(
        packed, "-f", str(text), "-c", str(length), "--chunks", str(windows), "--kl-divergence-base",
        str(probabilities), pattern=r"Final estimate: PPL = ([\d.]+)",
    )  # fmt: skip
    tokens, log_probabilities = _read_probabilities(probabilities)
    tokenizer = AutoTokenizer.from_pretrained(model)
    # In a text that is measured, llama.cpp takes the name of a special token for ordinary words.
    ours = tokenizer(text.read_text(), split_special_tokens=True, verbose=False).input_ids[: tokens.numel()]
    ids = tokens.clone()
    fields = gguf.GGUFReader(packed).fields
    begins = fields.get("tokenizer.ggml.add_bos_token")
    if begins is not None and bool(begins.contents()):
        ids[:, 0] = int(fields["tokenizer.ggml.bos_token_id"].contents())  # as llama-perplexity does
    logits = _logits(model, ids)
    reference = Reference(packed, probabilities, ids, logits)
    found = _tally(ids, logits, log_probabilities)
    row = {
        "method": "float32", "tokens": found.tokens, "same_tokens": ours == tokens.flatten().tolist(),
        "perplexity": perplexity, "transformers_perplexity": found.reference_perplexity,
        "kl_to_transformers": found.kl, "top1_agreement": found.top1_agreement,
    }  # fmt: skip
    return reference, row


def _read_probabilities(path: Path) -> tuple[Tensor, Tensor]:
    """Tokens [windows, length] and log-probabilities [windows, predicted, vocab] of `--kl-divergence-base`.

    Each position has a scale and a minimum in float32, then 16-bit codes (tools/perplexity/perplexity.cpp).
    """
    raw = np.fromfile(path, dtype=np.uint8)
    assert raw[:8].tobytes() == b"_logits_"
    length, vocab, windows = (int(n) for n in raw[8:20].view(np.int32))
    at = 20 + 4 * windows * length
    tokens = raw[20:at].view(np.int32).reshape(windows, length)
    rows = raw[at:].view(np.uint16).reshape(windows, length - 1 - length // 2, -1)
    scale, low = np.moveaxis(np.ascontiguousarray(rows[..., :4]).view(np.float32), -1, 0)
    values = rows[..., 4 : 4 + vocab] * scale[..., None] + low[..., None]
    return torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(values.astype(np.float32))


@torch.no_grad()
def _logits(folder: Path, ids: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """float32 [windows, predicted, vocab] where llama-perplexity looks; `weights` take the place of matrices."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, weight in (weights or {}).items():
        model.get_submodule(name).weight.copy_(weight)
    half = ids.shape[1] // 2
    return torch.cat([model(part, use_cache=False).logits[:, half:-1].float() for part in ids.split(8)])


def _tally(ids: Tensor, reference: Tensor, logits: Tensor) -> Divergence:
    tally = Tally()
    for window, p, q in zip(ids, reference, logits, strict=True):
        tally.add(p, q, window[-p.shape[0] :])
    return tally.result(1)


def _divergence(reference: Reference, logits: Tensor) -> dict[str, float]:
    found = asdict(_tally(reference.ids, reference.logits, logits))
    return {name: found[name] for name in ("kl", "kl_stderr", "perplexity", "top1_agreement")}


def _by_llama_cpp(tools: Tools, reference: Reference, path: Path) -> dict[str, float]:
    options = ("-c", str(reference.ids.shape[1]), "--kl-divergence", "--kl-divergence-base")
    number = r"\s*:\s*(-?[\d.]+)"
    pattern = rf"Mean PPL\(Q\){number}.*Mean\s+KLD{number} ±\s*([\d.]+).*Same top p{number}"
    perplexity, kl, stderr, top1 = tools.measure(path, *options, str(reference.probabilities), pattern=pattern)
    return {"kl": kl, "kl_stderr": stderr, "perplexity": perplexity, "top1_agreement": top1 / 100}


def _orders(anatomy: Anatomy, model: Path, path: Path) -> dict[str, int]:
    """Heads by module of the matrices whose rows llama.cpp keeps interleaved within a head (q and k of Llama).

    Told by the float32 file, whose numbers must be the checkpoint's.
    """
    original: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    heads = {"q": original.config.num_attention_heads, "k": original.config.num_key_value_heads}
    found, stored = {}, _decoded(anatomy, path, {})
    for block in anatomy.blocks:
        for matrix in block.matrices:
            weight = original.get_submodule(matrix.module).weight
            if torch.equal(stored[matrix.module], weight):
                continue
            found[matrix.module] = heads[matrix.role]
            back = _in_order(stored[matrix.module].numpy(), heads[matrix.role])
            assert np.array_equal(back, weight.detach().numpy()), matrix.module
    return found


def _decoded(anatomy: Anatomy, path: Path, orders: Mapping[str, int]) -> dict[str, Tensor]:
    """The matrices [rows, cols] that a GGUF file stands for, by module, in the checkpoint's order."""
    found, matrices = {}, _matrices(anatomy, path)
    for block in anatomy.blocks:
        for matrix in block.matrices:
            tensor = matrices[tensor_name(block.index, matrix)]
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            if matrix.module in orders:
                values = _in_order(values, orders[matrix.module])
            found[matrix.module] = torch.from_numpy(values.copy())
    return found


def _in_order(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undoes what conversion/llama.py calls permute."""
    rows, cols = values.shape
    return values.reshape(heads, rows // heads // 2, 2, cols).swapaxes(1, 2).reshape(rows, cols)


def _versions(tools: Tools) -> dict[str, str]:
    """llama.cpp's by the sdist that its sources came with, if they did."""
    package = tools.source.parents[1] / "llama_cpp" / "__init__.py"
    found = re.search(r'__version__ = "(.+)"', package.read_text()) if package.exists() else None
    return {"gguf": version("gguf")} | ({"llama-cpp-python": found[1]} if found else {})


if __name__ == "__main__":
    main()
