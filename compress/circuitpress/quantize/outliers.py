"""Which weights stay in float16: those that make rounding the others cheapest.

What an outlier costs is not its own rounding error but the grid of its group, which stretches to reach it; magnitude
says little about either where inputs differ. For every group of columns of a row:

1. The grid of the bulk is fitted without the two most extreme weights. The price of rounding weight j to it is its
   squared error times d_j = 1 / (H^-1)_jj, what remains once the other columns have made up for it (optimal brain
   surgeon, Hassibi and Stork 1993). Weights are ranked by that price.
2. The price of the group with its best-fitting grid is computed with the first 0, 1, 2, 4, 8... of them set free. The
   differences are what each place in float16 buys.
3. Places go to the best buys of the whole matrix, exactly as many as the format has (and one in every `BLOCK` weights
   at least, see `formats/outliers.py`).

Free weights are excluded from the grids that GPTQ fits, take up the feedback that reaches them and stay free in the
polish: their values are the best float16 numbers, not the original ones.

A super weight (Yu et al. 2024, arXiv 2411.07191) is one whose loss alone would cost more than `SUPER` nats a token,
1/2 w^2 d_j. They come first whatever else is cheap, and are named in the notes.
"""

import torch
from torch import Tensor

from ..formats import IntCodes, OutlierCodes, OutlierFormat
from ..formats.outliers import BLOCK
from .feedback import gptq
from .grid import fit_grid, round_to_grid, scale_tops
from .polish import DAMPING

SUPER = 0.01
"""Nats per token from which a single weight is a super weight."""
_EXTREMES = 2
_NAMED = 5


def round_with_outliers(
    weight: Tensor, hessian: Tensor, form: OutlierFormat, *, polished: bool
) -> tuple[OutlierCodes, str]:
    """Rounds `weight` [rows, cols] to `form`; the string holds fallbacks and super weights, '' for none."""
    rows, cols = weight.shape
    weight = weight.float()
    size = form.base.group_size
    bounds = [(at, min(at + size, cols)) for at in range(0, cols, size)]
    free, note = choose(weight, hessian, form, bounds)
    maxq = torch.full((rows, len(bounds)), 2**form.base.bits - 1, device=weight.device)
    tops = None
    if form.base.scale_bits != 16:
        tops = scale_tops(weight.masked_fill(free, 0), bounds, form.base.bits).expand(-1, len(bounds))
    rounding = gptq(weight, hessian, bounds, maxq, tops=tops, free=free, polished=polished)
    assert rounding.values is not None
    positions = free.flatten().nonzero()[:, 0]
    values = rounding.values.reshape(-1)[positions].clamp(-65504, 65504).half()
    codes = IntCodes(rounding.codes.masked_fill(free, 0), rounding.scales, rounding.zeros)
    return OutlierCodes(codes, positions, values), "; ".join(part for part in (rounding.fallback, note) if part)


def choose(weight: Tensor, hessian: Tensor, form: OutlierFormat, bounds: list[tuple[int, int]]) -> tuple[Tensor, str]:
    """The outliers of `weight` float32 [rows, cols] as a mask bool [rows, cols], and a note on super weights."""
    rows, cols = weight.shape
    importance = surgeon_importance(hessian)
    gain = torch.empty_like(weight)
    for start, stop in bounds:
        gain[:, start:stop] = _gains(weight[:, start:stop].T, importance[start:stop], form).T
    alone = 0.5 * weight.square() * importance
    super_weights = (alone > SUPER).nonzero()
    gain[alone > SUPER] = torch.inf
    flat = gain.flatten()
    # One in every block first, whatever it buys: their distances must fit into 16 bits.
    needed = torch.stack([k * BLOCK + part.argmax() for k, part in enumerate(flat.split(BLOCK))])
    rest = flat.index_fill(0, needed, -torch.inf).argsort(descending=True, stable=True)
    free = torch.zeros_like(flat, dtype=torch.bool)
    free[needed] = True
    free[rest[: form.count(rows, cols) - len(needed)]] = True
    return free.view(rows, cols), _describe(super_weights, alone)


def surgeon_importance(hessian: Tensor) -> Tensor:
    """1 / (H^-1)_jj of the damped Hessian, float32 [cols]; ones if it cannot be inverted."""
    damped = hessian.double()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    factor, info = torch.linalg.cholesky_ex(damped)
    ones = torch.ones(len(hessian), device=hessian.device)
    if int(info) or not bool(factor.isfinite().all()):
        return ones
    importance = torch.cholesky_inverse(factor).diagonal().reciprocal().float()
    return importance if bool((importance > 0).all()) else ones


def _gains(group: Tensor, importance: Tensor, form: OutlierFormat) -> Tensor:
    """What freeing each weight of a group [width, rows] buys, in the order of their prices; 0 for the hopeless."""
    width, rows = group.shape
    maxq = torch.full((rows,), float(2**form.base.bits - 1), device=group.device)
    extreme = torch.zeros_like(group, dtype=torch.bool)
    if width > _EXTREMES:
        extreme.scatter_(0, group.abs().topk(_EXTREMES, dim=0).indices, True)
    price = _price(group, importance, maxq, extreme)
    order = price.argsort(dim=0, descending=True)
    totals, counts, free = [_total(group, importance, maxq, torch.zeros_like(extreme))], [0], torch.zeros_like(extreme)
    while counts[-1] < min(width, max(_EXTREMES + 1, 8 * form.percent * width / 100)):
        counts.append(min(2 * counts[-1] or 1, width))
        free = free.scatter(0, order[counts[-2] : counts[-1]], True)
        totals.append(_total(group, importance, maxq, free))
    gain, least = torch.zeros_like(group), torch.full_like(totals[0], torch.inf)
    for k, (first, last) in enumerate(zip(counts, counts[1:], strict=False)):
        # A pair may pay where one alone does not, hence the best average from here on; never more than those before.
        averages = [(totals[k] - totals[j]) / (counts[j] - first) for j in range(k + 1, len(counts))]
        least = torch.stack(averages).amax(0).clamp(min=0).minimum(least)
        gain.scatter_(0, order[first:last], least.expand(last - first, -1))
    return gain


def _price(group: Tensor, importance: Tensor, maxq: Tensor, free: Tensor) -> Tensor:
    """The price of every weight [width, rows] on the grid of those that are not free."""
    scale, zero = fit_grid(group, maxq, importance, free=free)
    return importance[:, None] * (round_to_grid(group, scale.float(), zero, maxq)[1] - group).square()


def _total(group: Tensor, importance: Tensor, maxq: Tensor, free: Tensor) -> Tensor:
    """The price [rows] of a group whose weights `free` cost nothing."""
    return _price(group, importance, maxq, free).masked_fill(free, 0).sum(0)


def _describe(found: Tensor, alone: Tensor) -> str:
    if not len(found):
        return ""
    worst = found[alone[found[:, 0], found[:, 1]].argsort(descending=True)][:_NAMED].tolist()
    named = ", ".join(f"[{r}, {c}] ({float(alone[r, c]):.2g} nats)" for r, c in worst)
    count = "1 super weight" if len(found) == 1 else f"{len(found)} super weights"
    return f"{count} kept in float16: {named}" + (" ..." if len(found) > _NAMED else "")
