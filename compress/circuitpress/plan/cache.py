"""The bits of every KV head's keys and values within bytes of a token: the same knapsack as for weights."""

from ..errors import InfeasibleBudget, RecipeError
from ..units import Prices
from .budget import Budget
from .constraints import Constraint
from .solve import Solution, solve


def plan_cache(prices: Prices, budget: str, *, tokens: int) -> Solution:
    """The cheapest bits within `budget`: percent of the cache in 16 bits (40%), or bytes of a token (24kB).

    `prices` holds the bytes of `tokens` tokens, 16 bits in its last column. RecipeError for another kind of budget;
    InfeasibleBudget if heads of the fewest bits exceed it.
    """
    limit = Budget.parse(budget)
    whole = int(prices.nbytes[:, -1].sum())
    if limit.unit == "%":
        cap = float(limit.value) * whole / 100
    elif limit.counts_files:
        cap = float(limit.linear_bytes(0, 0) * tokens)
    else:
        hint = "write percent of the cache in 16 bits (40%) or bytes of a token (24kB)"
        raise RecipeError([f"--budget: {budget!r} is no budget for a cache"], hint=hint)
    least = int(prices.nbytes.min(1).sum())
    if least > cap:
        raise InfeasibleBudget(
            f"a token may take {cap / tokens:,.0f} bytes of cache and takes {least / tokens:,.0f} in the fewest bits",
            smallest_bits=8 * least / (tokens * prices.linear_numel), smallest_bytes=least // tokens,
            hint=f"--budget {-(-100 * least // whole)}%",
        )  # fmt: skip
    rule = Constraint("budget", f"{budget} of the cache", weights=prices.nbytes.astype(float), cap=cap)
    return solve(prices, [rule])
