"""Compiles the encoder's kernels ahead of time and prints one json line a variant; not a test, but what a test runs."""

import json
import sys

from aot import TARGETS, compile_for
from circuitpress_kernels import viterbi_triton

VARIANTS = ((12, 2, 1), (12, 3, 1), (12, 4, 1), (13, 3, 2), (13, 5, 2), (13, 7, 2), (16, 2, 1))
FORWARD = {"terms": "*fp32", "features": "*fp32", "kept": "*fp32", "steps": "i32", "count": "i32"}
BACK = FORWARD | {"ends": "*i32", "codes": "*u8", "last": "i32"}
BACK_ORDER = ("terms", "features", "kept", "ends", "codes", "steps", "count", "last")


def main() -> None:
    for name, target in TARGETS.items():
        for memory, code_bits, width in VARIANTS if name == "sm_90" else VARIANTS[:1]:
            branches = 2**code_bits
            constants = {"TERMS": 2 * width, "BRANCHES": branches, "BUCKETS": 2**memory // branches}
            block = min(constants["BUCKETS"], viterbi_triton.STATES // branches)
            kernels = (
                (viterbi_triton.viterbi_forward, FORWARD, constants | {"BLOCK": block}, viterbi_triton.OPTIONS),
                (
                    viterbi_triton.viterbi_back,
                    {key: BACK[key] for key in BACK_ORDER},
                    constants | {"SEQUENCES": viterbi_triton.SEQUENCES},
                    viterbi_triton.BACK_OPTIONS,
                ),
            )
            for kernel, signature, constexprs, options in kernels:
                pointers = tuple(name for name, kind in signature.items() if kind.startswith("*"))
                signature |= dict.fromkeys(constexprs, "constexpr")
                found = compile_for(kernel, signature, constexprs, options, target, aligned=pointers)
                case = f"{kernel.fn.__name__} L={memory} B={code_bits} V={width} {name}"
                sys.stdout.write(json.dumps({"case": case, "target": name} | found) + "\n")


if __name__ == "__main__":
    main()
