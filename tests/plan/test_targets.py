"""Targets: which options, groups and bytes a runtime admits, and every rule of vLLM with a plan that breaks it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from circuitpress.errors import InfeasibleBudget, RecipeError
from circuitpress.plan import make_plan, pareto, solve
from circuitpress.plan.serving import RULES, Stored, fused_name, vllm_problems
from circuitpress.plan.targets import fit, option_problem, plan_problems, target_rules, tensor_type
from circuitpress.units import OUTER, Group, Prices, Segment

SIZES = {"q": (256, 256), "k": (128, 256), "v": (128, 256), "o": (256, 256), "gate": (384, 256), "up": (384, 256)}
SIZES |= {"down": (256, 384)}
PLACES = {role: ("mlp" if role in ("gate", "up", "down") else "self_attn") for role in SIZES}
BITS = {"sym4g32": 4.5, "sym4g128": 4.125, "sym8g128": 8.125, "nf4": 4.5, "llmint8": 8.1, "bfloat16": 16.0}
BITS |= {"int2g16": 3.1, "int4g32": 4.625}


def prices_of(*formats: str, layers: int = 2, down: int = 384) -> Prices:
    """Prices of a small Llama; the wider a format the cheaper, q and v dearer than k."""
    groups = []
    for layer in range(layers):
        for role, (rows, cols) in (SIZES | {"down": (256, down)}).items():
            module = f"model.layers.{layer}.{PLACES[role]}.{role}_proj"
            groups.append(Group(module, layer, (Segment(module, "rows", 0, rows, rows, cols),)))
    numel = np.array([group.numel for group in groups])
    bits = np.array([BITS[name] for name in formats])
    weight = np.array([1 + 3 * ("q_proj" in group.name) + 2 * ("up_proj" in group.name) for group in groups])
    nats = weight[:, None] * 4.0**-bits * numel[:, None] * 1e-3
    nbytes = np.ceil(numel[:, None] * bits / 8).astype(np.int64)
    return Prices(tuple(groups), formats, nbytes, nats, nats * 1.1, nats / 10)


def formats_of(plan: object) -> dict[str, str]:
    decisions = plan.decisions  # pyright: ignore[reportAttributeAccessIssue]
    return {segment.module: decision.format for decision in decisions for segment in decision.group.segments}


def test_fused_matrices_share_a_decision() -> None:
    prices = prices_of("sym4g32", "sym4g128", "sym8g128", "bfloat16")
    fitted = fit(prices, "compressed-tensors")
    names = [group.name.removeprefix("model.layers.0.") for group in fitted.groups[:4]]
    assert names == ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
    assert fitted.linear_numel == prices.linear_numel
    np.testing.assert_allclose(fitted.nats.sum(0), prices.nats.sum(0))
    np.testing.assert_allclose(fitted.stderr[0], np.sqrt(np.square(prices.stderr[:3]).sum(0)))
    for budget in ("4.4bpw", "5bpw", "6.3bpw", "9bpw"):
        plan = make_plan(fitted, budget=budget, target="compressed-tensors", other_bytes=0)
        formats = formats_of(plan)
        assert len(formats) == 14
        assert plan_problems("compressed-tensors", {m: Stored((f,), *_shape(m)) for m, f in formats.items()}) == []


def _shape(module: str) -> tuple[int, int]:
    return SIZES[module.rpartition(".")[2].removesuffix("_proj")]


def test_bytes_are_those_that_compressed_tensors_writes() -> None:
    fitted = fit(prices_of("sym4g32", "sym8g128"), "compressed-tensors")
    down = fitted.nbytes[3]
    assert down.tolist() == [256 * (384 // 2 + 2 * 12) + 16, 256 * (384 + 2 * 3) + 16]


def test_a_matrix_gets_only_what_its_shape_admits() -> None:
    fitted = fit(prices_of("sym4g128", "sym8g128", "bfloat16", down=352), "compressed-tensors")
    plan = make_plan(fitted, budget="9bpw", target="compressed-tensors", other_bytes=0)
    formats = formats_of(plan)
    assert formats["model.layers.0.mlp.down_proj"] == "bfloat16"
    assert formats["model.layers.0.self_attn.o_proj"] != "bfloat16"
    assert any(line.startswith("target: ") for line in plan.provenance["constraints"])
    front = pareto(fitted, constraints=target_rules(fitted, "compressed-tensors"))
    assert front[0].linear_bytes > fitted.nbytes.min(1).sum()
    with pytest.raises(InfeasibleBudget):
        make_plan(fitted, budget="4.2bpw", target="compressed-tensors", other_bytes=0)


def test_bitsandbytes_takes_nf4_where_64_divides() -> None:
    fitted = fit(prices_of("nf4", "bfloat16", down=400), "bitsandbytes")
    assert len(fitted.groups) == 14
    formats = formats_of(make_plan(fitted, budget="12bpw", target="bitsandbytes", other_bytes=0))
    assert formats["model.layers.1.mlp.down_proj"] == "bfloat16"
    assert "nf4" in formats.values()
    assert option_problem("bitsandbytes", "nf4", Segment("m", "rows", 0, 8, 8, 100)) is not None
    assert option_problem("bitsandbytes", "llmint8", Segment("m", "rows", 0, 8, 8, 100)) is None


def test_one_folder_of_bitsandbytes_holds_one_kind() -> None:
    with pytest.raises(RecipeError, match="nf4 and llmint8 cannot be in one model"):
        make_plan(prices_of("nf4", "llmint8"), budget="5bpw", target="bitsandbytes", other_bytes=0)
    both = {"a": Stored(("nf4",), 64, 64), "b": Stored(("llmint8",), 64, 64)}
    assert "transformers reads one" in plan_problems("bitsandbytes", both)[-1]


@pytest.mark.parametrize(
    ("form", "cols", "expected"),
    [
        ("int2g16", 512, "q2_k"), ("sym3g16", 256, "q3_k"), ("int4g32", 256, "q4_k"), ("int4g32", 96, "iq4_nl"),
        ("int5g32", 32, "q5_0"), ("sym6g16", 768, "q6_k"), ("sym8g32", 96, "q8_0"), ("bfloat16", 7, "bf16"),
        ("int2g16", 96, None), ("sym8g32", 40, None), ("int4g64", 256, None),
    ],
)  # fmt: skip
def test_types_of_llama_cpp_follow_the_shape(form: str, cols: int, expected: str | None) -> None:
    found = tensor_type(form, cols)
    assert (found and found.name) == expected
    assert (option_problem("gguf", form, Segment("m", "rows", 0, 8, 8, cols)) is None) == (expected is not None)


def test_bytes_are_those_of_llama_cpp() -> None:
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    from circuitpress.plan.targets import TENSOR_TYPES

    kinds = [kind for kind in TENSOR_TYPES.values()] + [kind.small for kind in TENSOR_TYPES.values() if kind.small]
    for kind in kinds:
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name.upper()]] == (kind.block, kind.nbytes)
    fitted = fit(prices_of("int2g16", "int4g32"), "gguf")
    assert fitted.nbytes[0].tolist() == [256 * 84, 256 * 144]  # q is 256 x 256: one block a row
    assert solve(fitted, target_rules(fitted, "gguf")).choice[6] == 1  # 384 columns: no Q2_K, but IQ4_NL


def test_matrices_priced_in_parts_are_refused() -> None:
    prices = prices_of("sym4g32", "bfloat16")
    half = Segment(prices.groups[0].name, "rows", 0, 128, 128, 256)
    broken = dataclasses.replace(prices.groups[0], segments=(half, dataclasses.replace(half, start=128, stop=256)))
    parts = dataclasses.replace(prices, groups=(broken, *prices.groups[1:]))
    with pytest.raises(RecipeError, match="priced in parts"):
        fit(parts, "compressed-tensors")
    assert fit(parts, "dense") is parts and fit(parts, "native") is parts


def test_embedding_and_head_stay_at_16_bits() -> None:
    segment = Segment("lm_head", "rows", 0, 97, 97, 256)
    prices = prices_of("sym4g32", "bfloat16")
    head = Group("lm_head", OUTER, (segment,))
    table = dataclasses.replace(
        prices, groups=(*prices.groups, head), nbytes=prices.nbytes[[*range(14), 0]], nats=prices.nats[[*range(14), 0]]
    )
    (rule,) = target_rules(table, "compressed-tensors")
    assert rule.allowed is not None and rule.allowed[-1].tolist() == [False, True]


BREACHES = {
    "one-format": {"m.o_proj": Stored(("sym4g32", "sym8g32"), 64, 128)},
    "fused": {"a.q_proj": Stored(("sym4g32",), 64, 128), "a.k_proj": Stored(("bfloat16",), 64, 128)},
    "symmetric": {"a.o_proj": Stored(("int4g32",), 64, 128)},
    "bits": {"a.o_proj": Stored(("sym3g32",), 64, 128)},
    "group-size": {"a.o_proj": Stored(("sym4g16",), 64, 128)},
    "divides": {"a.o_proj": Stored(("sym4g64",), 64, 96)},
    "words": {"a.o_proj": Stored(("sym4c",), 64, 140)},
    "tiles": {"a.o_proj": Stored(("sym4g32",), 96, 128)},
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_every_rule_of_vllm_is_held_by_its_check(rule: object) -> None:
    name, check, advice = rule.name, rule.check, rule.advice  # pyright: ignore[reportAttributeAccessIssue]
    assert len(check(BREACHES[name])) == 1
    fine = {module: Stored(("sym4g128",), *_shape(module)) for module in ("a.q_proj", "a.k_proj", "a.v_proj")}
    fine |= {"a.down_proj": Stored(("sym8c",), 256, 384), "a.o_proj": Stored(("bfloat16",), 31, 31)}
    assert check(fine) == []
    assert vllm_problems(BREACHES[name], advice=advice) != []
    if not advice:
        assert plan_problems("compressed-tensors", BREACHES[name]) != []


def test_a_mixed_plan_is_refused_with_the_reason() -> None:
    (line,) = plan_problems("compressed-tensors", BREACHES["fused"])
    reason = "vLLM lays them into one matrix and refuses different schemes"
    assert line == f"a.qkv_proj: q_proj is sym4g32, k_proj is bfloat16; {reason}"
    assert plan_problems("dense", BREACHES["fused"]) == []
    assert fused_name("model.layers.3.mlp.up_proj") == "model.layers.3.mlp.gate_up_proj"
    assert fused_name("lm_head") == "lm_head"


def test_the_page_on_serving_lists_the_rules() -> None:
    page = (Path(__file__).parents[2] / "docs" / "serve-elsewhere.md").read_text()
    for rule in RULES:
        assert f"| {rule.name} | {rule.says} | {rule.where} |" in page
