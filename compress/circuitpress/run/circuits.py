"""What `circuit find` and `circuit verify` do, and the tables that they print."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import Console, table
from ..errors import CheckpointError, RecipeError
from .opening import open_model

if TYPE_CHECKING:
    import circuitpress.behaviors
    import circuitpress.mech.circuits
    import circuitpress.stream

Result = tuple[str, dict[str, Any]]
SHOWN = 24
"""Parts of a circuit that a table lists."""


def find(
    model: str, console: Console, *, behavior: Path, name: str | None, method: str, nodes: bool, selection: str,
    size: int | None, faithfulness: float | None, steps: int, tolerance: float, window: int, seed: int, out: Path,
    device: str | None,
) -> Result:  # fmt: skip
    """Writes circuit.json and circuit.svg to `out`; RecipeError for options that contradict each other."""
    from ..mech.circuits import Settings, find_circuit, save_drawing

    if size is not None and faithfulness is not None:
        raise RecipeError(["--size and --faithfulness both say where to cut"], hint="give one of them")
    opened = open_model(model, device=device, spill=out / "spill")
    wanted = _behavior(behavior, name, opened.tokenizer, opened.stream)
    settings = Settings(
        "nodes" if nodes else "edges", method, steps, selection, size, faithfulness or 0.9, tolerance, window, seed  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    with console.progress("circuit") as advance:
        found = find_circuit(opened.stream, wanted, settings, advance=advance)
    found.save(out / "circuit.json")
    save_drawing(found, out / "circuit.svg")
    return _found(found, out), found.to_json() | {"files": [str(out / "circuit.json"), str(out / "circuit.svg")]}


def verify(
    model: str, console: Console, *, path: Path, behavior: Path, name: str | None, ablation: str, random: int,
    subsets: int, seed: int, out: Path | None, device: str | None,
) -> Result:  # fmt: skip
    """Writes verify.json to `out`, or beside the circuit."""
    from ..mech.circuits import Circuit, verify_circuit

    circuit = Circuit.load(path)
    folder = out or path.parent
    opened = open_model(model, device=device, spill=folder / "spill")
    wanted = _behavior(behavior, name or circuit.provenance.get("behavior"), opened.tokenizer, opened.stream)
    with console.progress("verify") as advance:
        checked = verify_circuit(
            opened.stream, wanted, circuit, ablation=ablation, random=random, subsets=subsets, seed=seed,  # pyright: ignore[reportArgumentType]
            advance=advance,
        )  # fmt: skip
    checked.save(folder / "verify.json")
    return _checked(checked), checked.to_json() | {"files": [str(folder / "verify.json")]}


def _behavior(path: Path, name: str | None, tokenizer: Any, stream: "circuitpress.stream.Stream") -> Any:
    """The one behavior meant; CircuitpressError where its prompts do not fit the model."""
    from ..behaviors import load_behaviors
    from ..score.metrics import rows_of

    unfit: dict[str, str] = {}
    found = {behavior.name: behavior for behavior in load_behaviors(path, tokenizer, unfit=unfit)}
    if name is None and len(found) == 1:
        name = next(iter(found))
    if name not in found:
        problem = f"{path}: " + (f"no behavior {name!r}" if name else f"holds {len(found)} behaviors")
        problem += f" ({unfit[name]})" if name in unfit else ""
        raise RecipeError([problem], hint=f"--name is one of: {', '.join(found) or 'none'}")
    rows = rows_of(found[name])
    if int(rows.max()) >= stream.anatomy.vocab or rows.shape[1] > (stream.anatomy.context or rows.shape[1]):
        raise CheckpointError(
            f"{name}: prompts of {rows.shape[1]} tokens with ids up to {int(rows.max())}, the model reads "
            f"{stream.anatomy.context} tokens of {stream.anatomy.vocab}",
            hint="shorten the prompts, or check that the tokenizer files belong to this checkpoint",
        )
    return found[name]


def _found(circuit: "circuitpress.mech.circuits.Circuit", out: Path) -> str:
    by_nodes = circuit.granularity == "nodes"
    scores = (
        dict(zip(circuit.graph.nodes, circuit.scores.tolist(), strict=True)) if by_nodes else circuit.scored_edges()
    )
    parts = [(node, node) for node in circuit.nodes] if by_nodes else [(f"{s}>{r}", (s, r)) for s, r in circuit.edges]
    parts.sort(key=lambda part: -abs(scores[part[1]]))  # pyright: ignore
    rows: list[tuple[str, ...]] = [(circuit.granularity[:-1], "score", "faithfulness lost without it")]
    for name, key in parts[:SHOWN]:
        need = circuit.necessity.get(name)
        rows.append((name, f"{scores[key]:+.3f}", "not measured" if need is None else f"{need:+.3f}"))  # pyright: ignore
    about = circuit.provenance
    lines = [
        f"metric {about['metric']}: {about['metric_whole']:.3f} whole, {about['metric_empty']:.3f} all ablated "
        f"({about['ablation']}; {about['pairs']} pairs)",
        f"ranked by {circuit.method} (gradient); chosen by ablation" if circuit.evidence == "causal"
        else f"ranked and chosen by {circuit.method} (gradient); nothing was ablated",
        f"protect: {' '.join(circuit.patterns)}",
    ]  # fmt: skip
    if len(parts) > SHOWN:
        lines.insert(0, f"... and {len(parts) - SHOWN} more in {out / 'circuit.json'}")
    of = f"{circuit.size} of {len(circuit.scores)} {circuit.granularity}"
    title = f"circuit of {about['behavior']}: {of}, faithfulness {circuit.faithfulness:.3f}"
    return "\n".join([table(title, rows), *lines])


def _checked(result: "circuitpress.mech.circuits.Verification") -> str:
    full, draws, gaps = result.faithfulness, result.random, [subset.gap for subset in result.completeness[1:]]
    left = result.completeness[0].model
    kind = "all" if draws.every else "drawn"
    rows: list[tuple[str, ...]] = [
        ("faithfulness", f"{full.value:.3f}", f"95 %: {full.low:.3f} to {full.high:.3f}"),
        ("left without the circuit", f"{left:.3f}", "0 is complete"),
        ("incompleteness, mean / most", *((f"{sum(gaps) / len(gaps):.3f} / {max(gaps):.3f}",) if gaps else ("-",)),
         f"{len(gaps)} parts of it missing"),
        (f"random circuits ({draws.count} {kind})", f"{draws.mean:.3f}", f"best {draws.highest:.3f}"),
        ("better than", f"{draws.percentile:.1f} %", "of the random circuits"),
        ("CPR / CMD", f"{result.curve.cpr:.3f} / {result.curve.cmd:.3f}", f"{len(result.curve.sizes)} sizes"),
    ]  # fmt: skip
    for need in result.minimality[:SHOWN]:
        last = "" if need.last is None else f"last of its block {need.last:+.3f}"
        rows.append((f"without {need.unit}", f"{need.alone:+.3f}", last))
    for group in result.groups:
        says = f"one by one {sum(group.single):.3f}" + (": redundant" if group.redundant else "")
        rows.append((f"ablated {_heads(group.heads)}", f"{group.together:.3f}", says))
    title = f"circuit of {result.behavior}: {result.size} of {result.total} {result.granularity}, "
    title += f"{result.ablation} ablation, causal"
    note = f"metric {result.metric}: {result.whole:.3f} whole, {result.empty:.3f} all ablated ({result.pairs} pairs)"
    return table(title, rows) + "\n" + note


def _heads(heads: tuple[str, ...]) -> str:
    """`L1.head.0,1,2` for heads of one block."""
    return heads[0] + "".join("," + head.rsplit(".", 1)[1] for head in heads[1:])
