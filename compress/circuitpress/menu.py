"""What is on offer: the names of formats, which of them a plan chooses from by default, and which each target takes."""

import re
from collections.abc import Sequence

_TRELLIS = r"trellis(1\.5|2|2\.5|3|3\.5|4)(l1[0-6])?"
_INT = r"int[2-8](g[1-9]\d*)?(s6)?(\+0\.(5|[1-4][1-9]?|0[1-9])%)?"
_CODE = r"code[2-4]((r[1-9]\d*)?g[1-9]\d*)?"
_SYM = r"sym[2-8](g[1-9]\d*|c)?"
FLOATING = r"float16|bfloat16|float32|dense"
FORMAT = re.compile(rf"{_INT}|{_SYM}|{_CODE}|{_TRELLIS}|nf4|llmint8|{FLOATING}")
"""Names that a recipe may give; `circuitpress.formats` reads them."""

OUTER_FORMAT = re.compile(r"int[2-8](g[1-9]\d*)?|float16|bfloat16|float32|dense")
"""Those that embedding and lm_head may have: they are rounded in stripes of rows, and codebooks, rotations and outliers
belong to whole matrices."""

NAMES = (
    "int2 to int8 (int4g32 for groups of 32, int4s6 for scales in 6 bits, int4+0.5% for outliers), sym2 to sym8 "
    "(symmetric; sym4g32, sym8c for whole rows), code2 to code4 (code3g64, code3r16g64), trellis1.5 to trellis4 by "
    "halves, nf4, llmint8, float16, bfloat16, float32, dense"
)
"""The same in words, for messages."""

MENU = (
    *("int2g32", "int2", "int2g128", "int3g32", "int3", "int3g128", "int4g32", "int4", "int4g128"),
    *("int5", "int6", "int8", "dense"),
)
"""The default menu. Groups of 32 and 128 beside 64 give the planner steps of 0.15 to 0.3 bits: at the bytes of a
uniform 2-, 3- and 4-bit stories260K, KL falls by 11, 12 and 17 % against 0, 12 and 13 % without them."""

OUTER_MENU = ("int3", "int4g32", "int4", "int5", "int6", "int8", "dense")
"""What embedding and lm_head may be under a budget for all weight files."""

PROBES = ("2.3bpw", "2.6bpw", "3.0bpw", "3.5bpw", "4.5bpw")
"""The plans that are measured by default. Plans of the front bend as the plan will: through five of them the
median error of the corrected prediction is 1 to 4 % (stories260K, babyllama-105), through uniform 2, 3 and 4 bits 5 to
18 %."""

TARGETS = ("native", "compressed-tensors", "bitsandbytes", "gguf", "dense")
"""The runtimes that a plan can be for; plan/targets.py holds their rules."""

TARGET_FORMATS = {
    "compressed-tensors": rf"sym[48](g(32|64|128)|c)?|{FLOATING}",
    "bitsandbytes": rf"nf4|llmint8|{FLOATING}",
    "gguf": rf"int2g16|sym3g16|int4g32|int5g32|sym6g16|sym8g32|{FLOATING}",
}
"""What those that do not take everything hold."""

TARGET_WORDS = {
    "compressed-tensors": "sym4 and sym8 in groups of 32, 64, 128 or whole rows (sym4g128, sym8c), and floating types",
    "bitsandbytes": "nf4 or llmint8, and floating types",
    "gguf": "int2g16 (for Q2_K), sym3g16 (Q3_K), int4g32 (Q4_K), int5g32 (Q5_K), sym6g16 (Q6_K), sym8g32 (Q8_0) and "
    "floating types",
}
"""The same in words, for messages."""

TARGET_MENUS = {
    "compressed-tensors": ("sym4g32", "sym4g64", "sym4g128", "sym8g128", "sym8c", "dense"),
    "bitsandbytes": ("nf4", "dense"),
    "gguf": ("int2g16", "sym3g16", "int4g32", "int5g32", "sym6g16", "sym8g32", "dense"),
}
"""Their default menus."""


def refuse_formats(target: str, formats: Sequence[str]) -> list[str]:
    """What is wrong with offering `formats` (short or complete names) for `target`; an unknown target is, too."""
    if target not in TARGETS:
        return [f"plan.target: {target!r} is not a target: there are {', '.join(TARGETS)}"]
    if target not in TARGET_FORMATS:
        return []
    wrong = [name for name in formats if name != "drop" and not re.fullmatch(TARGET_FORMATS[target], name)]
    problems = (
        [f"plan.formats: {target} cannot hold {', '.join(wrong)}: it takes {TARGET_WORDS[target]}"] if wrong else []
    )
    if target == "bitsandbytes" and {"nf4", "llmint8"} <= set(formats):
        reason = "transformers reads one kind of packed matrix from a folder of bitsandbytes"
        problems.append(f"plan.formats: nf4 and llmint8 cannot be in one model: {reason}; offer one of them")
    return problems
