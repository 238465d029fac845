"""Which columns of a matrix to remove: greedy removal in nats, seeing what the remaining columns can make up for.

Removing the columns B of W and letting the others make up for it costs, in the quadratic model of the loss with the
second moment H of the inputs and the metric G of the outputs,

    1/2 tr( ([H^-1]_BB)^-1  W_B^T G W_B )

(Optimal Brain Surgeon, Hassibi and Stork 1993, for a block of columns and all rows at once). The compensation that
attains it does not depend on G, the cost does: G = E[g g^T] tells an output error that the loss feels from one that it
does not. Choosing a quarter of the neurons with G in place of the identity takes babyllama-105 from 0.153 to 0.138 nats
and stories260K from 0.537 to 0.524. The greedy algorithm

1. removes the unit with the least cost,
2. updates C = H^-1 and A = W^T G W as that removal and its compensation change them (two Schur complements, in closed
   form, so that W itself is never touched),
3. repeats; the costs of all removals add up to the cost of the set, since each is measured after the ones before.

Cheap units cost more together than apart: two neurons that say the same are each free to remove while the other stays.
Step 2 is what sees this; scores computed once, magnitudes or activation norms among them, do not.

Updates of the n x n matrices are collected and applied 64 columns at a time, as one product: n removals take about
3 n^3 multiply-adds, the cost of a few factorisations.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_LAZY = 64
"""Columns of pending updates before they are applied."""


class Removal(NamedTuple):
    """The order in which units leave: `order` int64 [removed], `cost` float64 [removed], the sum so far in nats."""

    order: Tensor
    cost: Tensor


def removal_order(
    moment: Tensor, gram: Tensor, *, width: int = 1, count: int, keep: Tensor | None = None, damping: float = 1e-3
) -> Removal:
    """Removes `count` units of `width` consecutive columns each, the cheapest first.

    `moment` [n, n] is H = E[s x x^T] of the inputs, `gram` [n, n] is W^T G W with tr(G) = rows; `keep` bool [units] are
    units that stay. `damping` is the share of the mean diagonal of H that is added to it. ValueError if fewer than
    `count` units may leave.
    """
    units = len(moment) // width
    stays = torch.zeros(units, dtype=torch.bool) if keep is None else keep.cpu().clone()
    if not 0 <= count <= units - int(stays.sum()):
        raise ValueError(f"{count} of {units} units cannot leave: {int(stays.sum())} of them must stay")
    c, a = inverse(moment, damping), gram.double().clone()
    span = torch.arange(len(c), device=c.device).view(units, width)
    own_c, own_a = (m[span[:, :, None], span[:, None, :]].clone() for m in (c, a))
    blocked = torch.zeros(units, dtype=torch.float64, device=c.device)
    blocked[stays.to(c.device)] = torch.inf
    p, u, q = (c.new_zeros(len(c), 0) for _ in range(3))
    order, cost, total = [], [], 0.0
    for _ in range(count):
        price = 0.5 * torch.linalg.solve(own_c, own_a).diagonal(dim1=1, dim2=2).sum(1) + blocked
        unit = int(price.argmin())
        total += max(float(price[unit]), 0.0)
        order.append(unit)
        cost.append(total)
        blocked[unit] = torch.inf
        at = span[unit]
        # The columns of C and A as the removals so far have left them.
        column_c = c[:, at] - p @ u[at].T
        column_a = a[:, at] - u @ q[at].T - q @ u[at].T
        inner_c, inner_a = own_c[unit].clone(), own_a[unit].clone()
        made_up = torch.linalg.solve(inner_c, column_c.T).T
        # A - u A_B: - A_:B u^T + u A_BB u^T, the last halved into the two others.
        rest = column_a - 0.5 * made_up @ inner_a
        own_u, own_p, own_q = (m[span] for m in (made_up, column_c, rest))
        own_c -= own_p @ own_u.mT
        own_a -= own_u @ own_q.mT + own_q @ own_u.mT
        # A unit that has left has no inverse; what stands there is never looked at again.
        own_c[unit], own_a[unit] = torch.eye(width, dtype=c.dtype, device=c.device), 0.0
        p, u, q = torch.cat([p, column_c], 1), torch.cat([u, made_up], 1), torch.cat([q, rest], 1)
        if p.shape[1] >= _LAZY:
            c -= p @ u.T
            a -= u @ q.T + q @ u.T
            p, u, q = (m[:, :0] for m in (p, u, q))
    return Removal(torch.tensor(order, dtype=torch.int64), torch.tensor(cost, dtype=torch.float64))


def inverse(moment: Tensor, damping: float) -> Tensor:
    """(H + damping x mean diagonal)^-1 in float64; more damping where that is not positive definite."""
    h = moment.double()
    mean = float(h.diagonal().mean()) or 1.0
    for share in (damping, 10 * damping, 1.0):
        damped = h.clone()
        damped.diagonal().add_(share * mean)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            return torch.cholesky_inverse(factor)
    return torch.eye(len(h), dtype=h.dtype, device=h.device) / mean
