"""What a run is said to need follows the limits that the engine has."""

from pathlib import Path

from circuitpress import price
from circuitpress.anatomy import read_anatomy
from circuitpress.recipe import Recipe
from circuitpress.run import preview
from circuitpress.store import Store


def test_limits_are_the_engines_own() -> None:
    """Written twice, since `check` loads no torch."""
    assert preview.FLOWS_LIMIT == price.KEPT_FLOWS
    assert preview.HESSIANS_LIMIT == price.KEPT_HESSIANS
    assert Store(None).limit == preview.STORE_LIMIT


def test_more_text_needs_more_up_to_the_limits(tiny_llama: Path) -> None:
    anatomy = read_anatomy(tiny_llama)
    recipe = Recipe(model=str(tiny_llama))
    few, many, most = (
        preview.estimate(anatomy, recipe.replace({"data.samples": samples})) for samples in (1, 8, 10**7)
    )
    assert few.memory["flows"] * 8 == many.memory["flows"] < preview.FLOWS_LIMIT
    assert most.memory["flows"] == preview.FLOWS_LIMIT
    assert most.memory["states"] == 2 * preview.STORE_LIMIT
    assert few.disk["prices"] < many.disk["prices"] < 8 * few.disk["prices"]  # Hessians do not grow with the text
