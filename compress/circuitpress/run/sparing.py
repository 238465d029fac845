"""Features of SAEs that the recipe asks to spare: their Hessians join those that weights are rounded with."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import circuitpress.run.session

log = logging.getLogger(__name__)

FOLDER = "pricing-features"


def feature_hessians(session: "circuitpress.run.session.Session") -> list[tuple[Path, float]]:
    """Shards with the Hessians of every feature set of the recipe, and its weight beside the text.

    Shards that lie there are taken as they are. Scores of the units that write the features lie beside them, as
    scores.safetensors. RecipeError and CircuitpressError for an SAE that does not fit.
    """
    from ..features import price_features, strongest
    from ..mech.sae import load_sae
    from ..mech.sites import Site
    from ..price import has_hessians, shard_path

    found = []
    for number, asked in enumerate(session.recipe.features):
        folder = session.path / FOLDER / str(number)
        scores = folder / "scores.safetensors"
        if not scores.exists() or not shard_path(folder, 0).exists():
            sae = load_sae(asked.sae, site=Site.parse(asked.site) if asked.site else None)
            with session.console.progress("features", len(session.anatomy.blocks)) as advance:
                made = price_features(
                    session.stream, session.windows[0].ids, sae, strongest(asked.top), draws=session.recipe.score.draws,
                    seed=session.recipe.data.seed, folder=folder, advance=advance,
                )  # fmt: skip
            replace(made, provenance=made.provenance | {"sae": str(asked.sae)}).save(scores)
        if has_hessians(folder):
            found.append((folder, asked.weight))
        else:
            log.warning("features %d: rounding does not know them: Hessians of so large a model are not kept", number)
    return found
