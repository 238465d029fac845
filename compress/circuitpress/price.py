"""Prices: what every group of weights costs in every format, in nats and bytes, from one backward walk.

For each block, from the last to the first, while it is resident:

1. Pull the gradients of all micro-batches, or of the first half of many, through it (score/fisher.py). This gives the
   Fisher scores of its units and, for every matrix, the token weights s. Other tokens weigh as much as these do at
   their position in the mean, and all tokens make the Hessian H = E[s x x^T].
2. Round every matrix to every format of the menu with that Hessian.
3. Price what the rounding did: with dY = (Q(W) - W) x,

       price = 1/2 E_t [ (g_t . dY_t)^2 ]

   for each segment of the matrix. The x and g of step 1 are kept for this up to a limit (36 thousand numbers a token in
   a 1 B model); the gradients of micro-batches beyond it are pulled through once more.

A block's results are one atomic shard, which a rerun skips after pulling the gradients through. For those who round
later, shards keep the Hessians of a small model; of a large one, whose Hessians take more than its weights, only the
token weights s, from which a forward walk without any gradient rebuilds them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save
from torch import Tensor, nn

from .anatomy import Anatomy, Block
from .console import Advance, ignore
from .files import write_bytes_atomic
from .formats import parse
from .hooks import weight_of
from .outer import outer_batches, outer_path, price_outer
from .quantize import Quantized, quantize_everywhere
from .score.fisher import Flow, add_second_moment, output_gradients, pull, saliency, unit_effects
from .score.inputs import KeptInputs, add_inputs, matrix_inputs
from .segments import Granularity, groups_of
from .store import Store, return_freed_memory
from .stream import Stream, backward, forward
from .units import Group, Prices, Scores, UnitId

KEPT_FLOWS = 1 << 29
"""Bytes of x and g that a block keeps between its two passes: all of a small model's, some of a large one's. What is
not kept costs another forward and backward pass of the block."""
KEPT_INPUTS = 1 << 29
"""Bytes of inputs that the forward walk keeps of tokens without a gradient, of a small model: running them through all
blocks once more for their Hessians takes 5 % of the time."""
GRADED_TOKENS = 1 << 13
"""Tokens up to which all have gradients; of more, half of them, in whole micro-batches: a token with a gradient takes
three times as long as one without. With 12, 8 or 4 of 28 thousand tokens KL at 2.6 to 4.6 bits is .5 % lower, 1.2 and
.5 % higher in the mean than with 16, and 7 % either way at most (stories260K, babyllama-105, two samples each)."""
PRICED_TOKENS = 1 << 12
"""Tokens that changes are priced on, in whole micro-batches: every format costs a product with each of them. Plans of
five formats on two or four times as many are as good to 3 % of KL (three checkpoints, three budgets)."""
FORWARD = 1 / 8
"""What the forward walk counts for in the progress of a block: 0.4 of 5.7 s on the demo model in five formats."""
KEPT_HESSIANS = 1 << 28
"""Bytes of Hessians, of all blocks together, up to which they are stored."""
_NEAREST = "nearest"
"""What marks a shard that was made without feedback. No second key of metadata: safetensors orders them by chance."""


def price(
    stream: Stream, windows: Tensor, *, formats: Sequence[str], granularity: Granularity = "matrix", draws: int = 1,
    seed: int = 0, neuron_block: int = 64, neuron_order: Mapping[int, NDArray[np.int64]] | None = None, folder: Path,
    outer: Sequence[str] = (), positions: Tensor | None = None, beside: Sequence[tuple[Path, float]] = (),
    rounded_for: Path | None = None, feedback: bool = True, advance: Advance = ignore,
) -> tuple[Scores, Prices]:  # fmt: skip
    """Prices every group of the model in every format, and scores every unit.

    `windows` int64 [n, length] are calibration tokens, `formats` complete format names, `draws` the number of label
    draws per token, `folder` the place of the per-block shards. `neuron_order` (by layer) makes unit-wise prices of two
    texts comparable; by default neurons are sorted by their own scores. Embedding and lm_head are priced in the formats
    `outer` (`outer.load_outer` reads them). Returns Fisher scores and prices in nats per predicted token. Raises
    CheckpointError for weights or activations that are not finite.

    For behaviors, whose prompts matter at some places only: `positions` bool [n, length] says which predictions count,
    and nats are per prediction that counts; `beside` are folders of shards whose Hessians, times a weight, join those
    that weights are rounded with, in blocks for which there are any; `rounded_for` is a folder whose Hessians are used
    instead. Without `feedback` nothing is left of a Hessian but its diagonal, here and for whoever rounds later: every
    weight goes to its nearest code, and columns differ in their importance alone.
    """
    batches = stream.batches(windows)
    hidden, gradients, finals = stream.store("inputs"), stream.store("gradients"), stream.store("finals")
    outer = () if outer_path(folder).exists() else outer
    try:
        graded = batches[: len(batches) if positions is not None else _graded(batches)]
        read = KeptInputs(stream, batches, len(graded), KEPT_INPUTS)
        forward(
            stream, batches, hidden, keep=True, around=read.watch,
            advance=lambda n, note: advance(FORWARD * n, f"forward, {note}"),
        )  # fmt: skip
        keys = output_gradients(stream, graded, hidden, gradients, draws=draws, seed=seed, positions=positions)
        counted = windows.numel() if positions is None else int(positions.sum())
        others = [(rounded_for, 1.0)] if rounded_for else list(beside)
        for b in range(outer_batches(batches) if outer else 0):
            finals.put((0, b), hidden.get((stream.depth, b)))

        def visit(index: int, module: nn.Module, inputs: Callable[[int], Tensor]) -> None:
            place = stream.anatomy.blocks[index]
            sizes, length = [len(ids) for ids in batches], windows.shape[1]
            visitor = BlockPricer(stream, module, place, inputs, gradients, keys, sizes, length, counted, read)
            path = shard_path(folder, index)
            if path.exists():
                visitor.pull_all()
            else:
                groups = groups_of(place, granularity, neuron_block=neuron_block)
                order = (neuron_order or {}).get(index)
                there = [(other, weight) for other, weight in others if shard_path(other, index).exists()]
                hessians = [(load_hessians(other, place, stream.device), weight) for other, weight in there]
                arrays, notes = visitor.price(
                    formats, groups, by_unit=granularity == "unit", order=order, hessians=hessians,
                    replace=rounded_for is not None, feedback=feedback,
                )  # fmt: skip
                write_bytes_atomic(path, save(arrays, metadata={"notes": json.dumps(notes)}))
            advance(1 - FORWARD, f"priced block {index}")

        backward(stream, hidden, len(batches), visit)
        if outer:
            price_outer(stream, batches, finals, gradients, formats=outer, draws=draws, seed=seed, folder=folder)
    finally:
        finals.clear()
        hidden.clear()
        gradients.clear()
    return collect(stream, folder, formats, granularity, neuron_block=neuron_block)


def _graded(batches: Sequence[Tensor]) -> int:
    """How many micro-batches have gradients."""
    ends = np.cumsum([ids.numel() for ids in batches])
    return max(1, int(np.searchsorted(ends, max(GRADED_TOKENS, ends[-1] / 2), side="right")))


def shard_path(folder: Path, index: int) -> Path:
    """The shard of block `index`."""
    return folder / f"block-{index:05d}.safetensors"


def load_saliency(folder: Path, index: int, module: str) -> Tensor:
    """The token weights s [windows, length] of one matrix, as priced."""
    with safe_open(shard_path(folder, index), framework="pt") as file:
        return file.get_tensor(f"saliency.{module}")


def has_hessians(folder: Path) -> bool:
    """Whether the shards in `folder` hold Hessians."""
    with safe_open(shard_path(folder, 0), framework="np") as file:
        return any(name.startswith("hessian.") for name in file.keys())  # noqa: SIM118


def has_feedback(folder: Path) -> bool:
    """Whether errors of rounding are fed back to other columns, or weights were priced at their nearest codes."""
    with safe_open(shard_path(folder, 0), framework="np") as file:
        return _NEAREST not in file.keys()  # noqa: SIM118


def load_hessians(folder: Path, place: Block, device: torch.device) -> dict[str, Tensor]:
    """The Hessians [cols, cols] of a block's matrices, as priced."""
    with safe_open(shard_path(folder, place.index), framework="pt") as file:
        return {m.module: file.get_tensor(f"hessian.{m.module}").to(device) for m in place.matrices}


def collect(
    stream: Stream, folder: Path, formats: Sequence[str], granularity: Granularity, *, neuron_block: int = 64
) -> tuple[Scores, Prices]:
    """Joins the shards of all blocks into Scores and Prices."""
    names = ("nats", "nats_sequence", "stderr", "nbytes")
    table: dict[str, list[NDArray[Any]]] = {name: [] for name in names}
    groups: list[Group] = []
    units: list[UnitId] = []
    values, stderr, order, notes = [], [], {}, {}
    for place in stream.anatomy.blocks:
        arrays = load_file(shard_path(folder, place.index))
        for name in names:
            table[name].append(arrays[name])
        groups += groups_of(place, granularity, neuron_block=neuron_block)
        units += place.units()
        values.append(arrays["scores"])
        stderr.append(arrays["scores_stderr"])
        if "neuron_order" in arrays:
            order[place.index] = arrays["neuron_order"]
        with safe_open(shard_path(folder, place.index), framework="np") as file:
            notes |= json.loads(file.metadata()["notes"])
    scores = Scores("fisher", "gradient", tuple(units), np.concatenate(values), np.concatenate(stderr))
    nbytes, *nats = (np.concatenate(table[name]) for name in ("nbytes", "nats", "nats_sequence", "stderr"))
    prices = Prices(
        tuple(groups), tuple(formats), nbytes, *nats, neuron_order=order, provenance={"fallbacks": notes},
        original_numel=stream.anatomy.original_numel,
    )  # fmt: skip
    return scores, prices


def _keeps_hessians(anatomy: Anatomy) -> bool:
    return 4 * sum(m.cols**2 for block in anatomy.blocks for m in block.matrices) <= KEPT_HESSIANS


class BlockPricer:
    """The work on one resident block."""

    def __init__(
        self, stream: Stream, module: nn.Module, place: Block, inputs: Callable[[int], Tensor], gradients: Store,
        keys: Sequence[tuple[int, int]], sizes: Sequence[int], length: int, counted: int,
        read: KeptInputs | None = None,
    ) -> None:  # fmt: skip
        self.stream, self.module, self.place = stream, module, place
        self.inputs, self.gradients, self.keys, self.read = inputs, gradients, keys, read
        self.windows, self.length = sum(sizes), length
        self.draws = 1 + max(draw for _, draw in keys)
        # From means over all tokens to means over the predictions that count.
        self.scale = self.windows * self.length / counted
        starts = np.concatenate([[0], np.cumsum(sizes)])
        self.rows = [slice(int(a), int(b)) for a, b in zip(starts[:-1], starts[1:], strict=True)]
        self.kept: dict[tuple[int, int], Mapping[str, Flow]] = {}
        self.room = KEPT_FLOWS
        self.graded = 1 + max(b for b, _ in keys)
        """How many micro-batches have gradients."""
        ends = np.cumsum(sizes) * self.length
        self.priced = min(self.graded, max(1, int(np.searchsorted(ends, PRICED_TOKENS, side="right"))))
        """How many micro-batches changes are priced on."""

    def pull_all(self, see: Callable[[int, Mapping[str, Flow]], None] | None = None, *, keep: bool = False) -> None:
        """Pulls every gradient through the block, once, and shows its flows to `see`.

        With `keep` the block will be asked again for those that are priced (`pull_priced`): where their flows are not
        kept, the gradients at the block's output stay in place.
        """
        for b, draw in self.keys:
            flows = self._pull(b, draw, keep=keep and b < self.priced)
            if see is not None:
                see(b, flows)

    def pull_priced(self, see: Callable[[int, Mapping[str, Flow]], None]) -> None:
        """Shows the flows of the micro-batches that are priced to `see`, after `pull_all` with `keep`."""
        for b, draw in self.keys:
            if b < self.priced:
                see(b, self.kept.pop((b, draw), None) or self._pull(b, draw, keep=False))

    def _pull(self, b: int, draw: int, *, keep: bool) -> Mapping[str, Flow]:
        """One gradient through the block. With `keep` either its flows are held, or it stays where it is."""
        return_freed_memory()
        gradient = self.gradients.get((b, draw), self.stream.device)
        pulled, flows = pull(self.stream, self.module, self.place, self.inputs(b), gradient)
        kept = keep and self._keep((b, draw), flows)
        if kept or not keep:
            self.gradients.put((b, draw), pulled)
        return flows

    def _keep(self, key: tuple[int, int], flows: Mapping[str, Flow]) -> bool:
        """Holds on to `flows` if there is room; matrices that read the same x share its memory."""
        storages = [tensor.untyped_storage() for flow in flows.values() for tensor in flow]
        if (size := sum({s.data_ptr(): s.nbytes() for s in storages}.values())) > self.room:
            return False
        self.room -= size
        self.kept[key] = flows
        return True

    def price(
        self, formats: Sequence[str], groups: Sequence[Group], *, by_unit: bool, order: NDArray[np.int64] | None,
        hessians: Sequence[tuple[Mapping[str, Tensor], float]], replace: bool, feedback: bool = True,
    ) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:  # fmt: skip
        """The arrays of the block's shard, and notes on fallbacks by matrix. `hessians` join, or `replace`, its own."""
        scores, weights, own = self._statistics()
        for other, weight in hessians:
            own = {name: other[name] if replace else hessian + weight * other[name] for name, hessian in own.items()}
        if not feedback:
            own = {name: hessian.diagonal().diag() for name, hessian in own.items()}
        arrays: dict[str, NDArray[Any]] = {f"saliency.{name}": s.numpy() for name, s in weights.items()}
        if not feedback:
            arrays[_NEAREST] = np.ones(1, dtype=bool)
        per_window = np.concatenate([scores[kind] for kind in ("head", "kv_group", "neuron")], axis=1)
        arrays["scores"], arrays["scores_stderr"] = per_window.mean(0), _stderr(per_window)
        if by_unit and order is None:
            # Stable, so that ties keep their place; the most important neurons come first.
            order = np.argsort(-scores["neuron"].mean(0), kind="stable").astype(np.int64)
        if order is not None:
            arrays["neuron_order"] = order
        if _keeps_hessians(self.stream.anatomy):
            arrays |= {f"hessian.{name}": hessian.cpu().numpy() for name, hessian in own.items()}
        rounded, notes = self._round(formats, own, order)
        token, sequence = self._errors(formats, groups, rounded, order)
        arrays["nats"], arrays["nats_sequence"], arrays["stderr"] = token.mean(0), sequence.mean(0), _stderr(token)
        nbytes = [[sum(parse(f).nbytes(s.rows, s.cols) for s in g.segments) for f in formats] for g in groups]
        arrays["nbytes"] = np.array(nbytes, dtype=np.int64)
        return arrays, notes

    def _statistics(self) -> tuple[dict[str, NDArray[np.float64]], dict[str, Tensor], dict[str, Tensor]]:
        """Unit scores [graded windows, units] by kind; token weights [windows, length] and Hessians [cols, cols] by
        matrix."""
        place, tokens = self.place, self.windows * self.length * self.draws / self.scale
        counts = {"head": place.heads, "kv_group": place.kv_heads, "neuron": place.neurons}
        graded = self.rows[self.graded - 1].stop
        scores = {kind: np.zeros((graded, count)) for kind, count in counts.items()}
        weights = {matrix.module: torch.zeros(self.windows, self.length) for matrix in place.matrices}
        hessians = {m.module: torch.zeros(m.cols, m.cols, device=self.stream.device) for m in place.matrices}

        def see(b: int, flows: Mapping[str, Flow]) -> None:
            rows = self.rows[b]
            for kind, effect in unit_effects(self.module, place, flows).items():
                squares = 0.5 * effect.square().unflatten(0, (-1, self.length)).mean(1) / self.draws
                scores[kind][rows] += squares.double().cpu().numpy() * self.scale
            for name, flow in flows.items():
                s = saliency(flow)
                weights[name][rows] += s.view(-1, self.length).cpu() * (self.scale / self.draws)
                add_second_moment(hessians[name], flow.x, s / tokens)

        self.pull_all(see, keep=True)
        for weight in weights.values():
            weight[graded:] = weight[:graded].mean(0)
        for b in range(self.graded, len(self.rows)):
            mine = {name: weight[self.rows[b]] / weight.numel() for name, weight in weights.items()}
            seen = self.read.take(place.index, b) if self.read else None
            add_inputs(seen or matrix_inputs(self.stream, self.module, place, self.inputs(b)), mine, hessians)
        return scores, weights, hessians

    def _round(
        self, formats: Sequence[str], hessians: dict[str, Tensor], order: NDArray[np.int64] | None
    ) -> tuple[dict[str, dict[str, Quantized]], dict[str, str]]:
        rounded, notes = {}, {}
        # Widest input last: by then the Hessians of the others are gone, which bounds the peak of memory.
        for matrix in sorted(self.place.matrices, key=lambda m: m.cols):
            return_freed_memory()
            weight = weight_of(self.module, self.place, matrix)
            hessian = hessians.pop(matrix.module)
            if order is not None:
                index = torch.from_numpy(order)
                weight = permute_neurons(matrix.role, weight, index)
                hessian = permute_inputs(matrix.role, hessian, index)
            rounded[matrix.module], note = quantize_everywhere(weight, hessian, formats, draft=True)
            if note:
                notes[matrix.module] = note
        return rounded, notes

    def _errors(
        self, formats: Sequence[str], groups: Sequence[Group], rounded: Mapping[str, Mapping[str, Quantized]],
        order: NDArray[np.int64] | None,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:  # fmt: skip
        """Per-token and per-sequence prices [priced windows, groups, formats]."""
        token = np.zeros((self.rows[self.priced - 1].stop, len(groups), len(formats)))
        sequence = np.zeros_like(token)
        index = None if order is None else torch.from_numpy(order)
        matrices = {matrix.module: matrix for matrix in self.place.matrices}

        def see(b: int, flows: Mapping[str, Flow]) -> None:
            rows = self.rows[b]
            for name, matrix in matrices.items():
                mine = [(i, group) for i, group in enumerate(groups) if group.segments[0].module == name]
                weight = weight_of(self.module, self.place, matrix).float()
                flow = flows[name]
                if index is not None:
                    weight = permute_neurons(matrix.role, weight, index)
                    flow = _permute_flow(matrix.role, flow, index)
                for f, form in enumerate(formats):
                    # Decoded for every micro-batch: keeping the changes would save 5 % of the time.
                    change = (rounded[name][form].decode() - weight).to(flow.x.dtype)
                    effect = _segment_effects(flow, change, [group for _, group in mine])
                    effect = effect.unflatten(0, (-1, self.length)).double().cpu().numpy()
                    for k, (i, _) in enumerate(mine):
                        share = 0.5 * self.scale / self.draws
                        token[rows, i, f] += share * np.square(effect[:, :, k]).mean(1)
                        sequence[rows, i, f] += share * np.square(effect[:, :, k].sum(1)) / self.length

        self.pull_priced(see)
        return token, sequence


def _segment_effects(flow: Flow, change: Tensor, groups: Sequence[Group]) -> Tensor:
    """g_t . dY_t [tokens, groups], where only the group's segment of the matrix changes by `change` [rows, cols]."""
    axis = groups[0].segments[0].axis
    products = (flow.x @ change.T) * flow.g if axis == "rows" else (flow.g @ change) * flow.x
    spans = [group.segments[0] for group in groups]
    return torch.stack([products[:, span.start : span.stop].sum(1, dtype=torch.float32) for span in spans], 1)


def permute_neurons(role: str, weight: Tensor, order: Tensor) -> Tensor:
    """Reorders the neurons of one matrix [rows, cols]: rows of gate and up, columns of down; others stay."""
    if role in ("gate", "up"):
        return weight[order]
    return weight[:, order] if role == "down" else weight


def permute_inputs(role: str, hessian: Tensor, order: Tensor) -> Tensor:
    """Reorders the neurons in the Hessian [cols, cols] of a matrix's inputs, which only those of down are."""
    return hessian[order][:, order] if role == "down" else hessian


def _permute_flow(role: str, flow: Flow, order: Tensor) -> Flow:
    if role in ("gate", "up"):
        return Flow(flow.x, flow.g[:, order])
    return Flow(flow.x[:, order], flow.g) if role == "down" else flow


def _stderr(per_window: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard error of the mean over windows [n, ...]; infinite for a single window, whose spread is unknown."""
    n = per_window.shape[0]
    return per_window.std(0, ddof=1) / np.sqrt(n) if n > 1 else np.full(per_window.shape[1:], np.inf)
