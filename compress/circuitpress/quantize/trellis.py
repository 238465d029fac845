"""Round a matrix to trellis formats: rotate, then LDL feedback strip by strip, each strip encoded by Viterbi search.

1. Rotate weights and Hessian into the basis of the codes. Strips are visited from the last to the first of an order
   that is built from its end: next comes the strip with the least variance that those chosen so far do not explain.
   Nothing stores the order. Strips in the order of their variance (act-order) have 3 to 11 % less error than strips as
   they come (stories260K, babyllama-105); by the factor's diagonal this order takes off another 1 to 6 %.
2. With H = L D L^T as in `feedback`, the error that strip g adds is |(T - Q_g) L_gg|^2 weighted by D_g, for the target

       T = W_g + (sum over later strips j of E_j L_jg) L_gg^-1

   Inside the strip a ring cannot feed errors from column to column, since all its weights are chosen at once: the
   metric L_gg D_g L_gg^T is replaced by its diagonal, which weighs the squared errors in the search. (QTIP, arXiv
   2406.11235, section 3, feeds back by blocks too, unweighted.)
3. Targets are larger than weights by what is fed back, more so in some strips than in others. A row's scale is the
   deviation of its weights; a strip's, fixed when its turn comes, that of its targets on top. Once the strip is encoded
   its scale is fitted to the codes.
4. When all codes are known, every row's scale is refitted: tr(E H E^T) is a parabola in it.

Rounding depends on the weights, the Hessian and the shape only; several formats share the rotation and the factor.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..formats.trellis import (
    STRIP,
    TrellisCodes,
    TrellisFormat,
    rotate_inputs,
    row_codes,
    row_scales,
    strip_codes,
    strip_scales,
    strips,
)
from .feedback import DAMPING, factor
from .viterbi import encode

GAIN = 1.1
"""How much wider than a Gaussian of their variance targets are taken to be, their tails being heavier: error falls by
4 % from 1.0 to 1.05 and by 1 % from there to 1.1 (babyllama-105, 2 to 4 bits)."""


def round_trellis(weight: Tensor, hessian: Tensor, forms: Sequence[TrellisFormat]) -> tuple[list[TrellisCodes], str]:
    """Rounds `weight` [rows, cols] to each format; the second value says how the factorisation had to be rescued.

    `hessian` is float32 [cols, cols]; without a usable one weights are rounded with equal importance.
    """
    unit, diagonal, order, columns, fallback = factor_strips(hessian)
    rotated = rotate_inputs(weight.float())[:, columns]
    return [_round(rotated, unit, diagonal, order, form) for form in forms], fallback


def factor_strips(hessian: Tensor) -> tuple[Tensor, Tensor, list[tuple[int, int]], Tensor, str]:
    """Factor and diagonal of the rotated Hessian with columns in reverse order of visiting, strips and columns in that
    order, and the note on fallbacks.
    """
    usable = bool(hessian.isfinite().all()) and float(hessian.diagonal().sum()) > 0
    turned = rotate_inputs(rotate_inputs(hessian.float()).T) if usable else hessian.float()
    order = _visiting_order(turned) if usable else list(strips(len(hessian)))
    columns = torch.cat([torch.arange(start, stop, device=hessian.device) for start, stop in order])
    unit, diagonal, fallback = factor(turned, columns)
    return unit, diagonal, order, columns, fallback


def _visiting_order(hessian: Tensor) -> list[tuple[int, int]]:
    """The strips in reverse order of visiting: each has the least variance that those before it leave unexplained.

    A pivoted Cholesky factorisation, strip by strip: the factor's rows of the strips to come tell what is explained.
    """
    places = list(strips(len(hessian)))
    damping = DAMPING * hessian.diagonal().mean()
    unexplained = hessian.diagonal() + damping
    lower = torch.zeros_like(hessian)
    strip = torch.arange(len(hessian), device=hessian.device) // STRIP
    waiting = torch.zeros(len(places), device=hessian.device)
    order, at = [], 0
    for _ in places:
        # A Hessian that is not positive definite yields some order, and `factor` deals with it.
        variance = torch.zeros_like(waiting).index_add_(0, strip, unexplained).div_(strip.bincount())
        chosen = int(variance.nan_to_num(nan=1e30, posinf=1e30).add_(waiting).argmin())
        start, stop = places[chosen]
        columns = hessian[:, start:stop] - lower[:, :at] @ lower[start:stop, :at].T
        columns[start:stop].diagonal().add_(damping)
        root = torch.linalg.cholesky_ex(columns[start:stop])[0]
        new = torch.linalg.solve_triangular(root.T, columns, upper=True, left=False)
        lower[:, at : at + stop - start] = new
        unexplained -= new.square().sum(1)
        waiting[chosen] = torch.inf
        order.append((start, stop))
        at += stop - start
    return order


def _round(
    weight: Tensor, unit: Tensor, diagonal: Tensor, order: list[tuple[int, int]], form: TrellisFormat
) -> TrellisCodes:
    """Rounds rotated weights with the factors of the rotated Hessian."""
    rows, cols = weight.shape
    base, row_logs = row_codes(weight.square().mean(1).sqrt_())
    by_row = row_scales(base, row_logs)[:, None]
    table = form.table(weight.device)
    error, found = torch.zeros_like(weight), torch.empty_like(weight)
    codes: dict[int, Tensor] = {}
    strip_logs: dict[int, Tensor] = {}
    stop = cols
    for first, last in reversed(order):
        start = stop - (last - first)
        inner = unit[start:stop, start:stop]
        passed_on = error[:, stop:] @ unit[stop:, start:stop]
        target = torch.linalg.solve_triangular(inner, passed_on, upper=False, left=False, unitriangular=True)
        target.add_(weight[:, start:stop]).div_(by_row)
        cost = (inner.square() @ diagonal[start:stop]) * by_row.square()
        cost /= cost.mean()
        wanted = GAIN * (cost * target.square()).mean().sqrt()
        scale = strip_scales(strip_codes(wanted))
        strip = _encode_strip(target / scale, cost, table, form)
        values = form.strip_values(strip, rows=rows, strip=stop - start)
        fitted = (cost * target * values).sum() / (cost * values.square()).sum()
        codes[first], strip_logs[first] = strip.flatten(), strip_codes(torch.where(fitted > 0, fitted, scale))
        torch.mul(values, by_row * strip_scales(strip_logs[first]), out=found[:, start:stop])
        torch.sub(weight[:, start:stop], found[:, start:stop], out=error[:, start:stop])
        stop = start
    base, row_logs = _refit(weight @ unit, found @ unit, diagonal, by_row[:, 0])
    places = sorted(codes)
    strips_in_order = torch.stack([strip_logs[place] for place in places])
    return TrellisCodes(torch.cat([codes[place] for place in places]), base, row_logs, strips_in_order, (rows, cols))


def _encode_strip(target: Tensor, cost: Tensor, table: Tensor, form: TrellisFormat) -> Tensor:
    """Codes uint8 [rings, steps] of a strip [rows, width] whose squared errors are weighed by `cost`."""
    rings = form.rings(target.numel())
    missing = rings.count * rings.values - target.numel()
    short = rings.steps * form.width - rings.values
    target, cost = (
        torch.nn.functional.pad(
            torch.nn.functional.pad(part.flatten(), (0, missing)).view(rings.count, rings.values), (0, short)
        )
        for part in (target, cost.expand_as(target))
    )
    return encode(target, table, code_bits=form.code_bits, weights=cost)


def _refit(target: Tensor, found: Tensor, diagonal: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Scales with the least error, given the codes; `target` and `found` [rows, cols] are multiplied by the factor."""
    product, square = (target * found) @ diagonal, found.square() @ diagonal
    return row_codes(scale * torch.where(square > 0, product / square, 1).clamp_(0.5, 2))
