"""What is on offer: the names of formats, and which of them a plan chooses from unless a recipe says otherwise."""

import re

_TRELLIS = r"trellis(1\.5|2|2\.5|3|3\.5|4)(l1[0-6])?"
_INT = r"int[2-8](g[1-9]\d*)?(s6)?(\+0\.(5|[1-4][1-9]?|0[1-9])%)?"
_CODE = r"code[2-4]((r[1-9]\d*)?g[1-9]\d*)?"
FORMAT = re.compile(rf"{_INT}|{_CODE}|{_TRELLIS}|float16|bfloat16|float32|dense")
"""Names that a recipe may give; `circuitpress.formats` reads them."""

OUTER_FORMAT = re.compile(r"int[2-8](g[1-9]\d*)?|float16|bfloat16|float32|dense")
"""Those that embedding and lm_head may have: they are rounded in stripes of rows, and codebooks, rotations and outliers
belong to whole matrices."""

NAMES = (
    "int2 to int8 (int4g32 for groups of 32, int4s6 for scales in 6 bits, int4+0.5% for outliers), code2 to code4 "
    "(code3g64, code3r16g64), trellis1.5 to trellis4 by halves, float16, bfloat16, float32, dense"
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
