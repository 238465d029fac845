"""Compiles the kernel ahead of time and prints one json line a target; not a test, but what a test runs.

A process of its own: under the interpreter or the type checks of the tests the kernel could not be compiled. No GPU and
no CUDA toolkit are needed, Triton's wheel brings ptxas and cuobjdump.
"""

import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from circuitpress_kernels import int4, int4_triton

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
POINTERS = {"codes": "*u8", "scales": "*fp16", "zeros": "*u8", "partials": "*fp32"}
NUMBERS = ("batch", "cols", "x_stride", "groups", "groups_each")
CONSTANTS = ("GROUP", "ROWS", "BATCH", "DOT")
ALIGNED = ("x", *POINTERS, "cols", "x_stride")


def main() -> None:
    for name, target in TARGETS.items():
        # All variants for one device; for the others the one that most checkpoints use.
        wanted = product(TYPES, int4.GROUP_SIZES) if name == "sm_90" else [("bf16", 64), ("bf16", 128)]
        for kind, group_size in wanted:
            found = inspect(kind, TYPES[kind], group_size, target)
            sys.stdout.write(json.dumps({"case": f"{kind} g{group_size} {name}", "target": name} | found) + "\n")


def inspect(kind: str, dot: tl.dtype, group_size: int, target: GPUTarget) -> dict[str, object]:
    signature = {"x": f"*{kind}"} | POINTERS | dict.fromkeys(NUMBERS, "i32") | dict.fromkeys(CONSTANTS, "constexpr")
    constants = {"GROUP": group_size, "ROWS": int4.TILE_ROWS, "BATCH": int4.MAX_BATCH, "DOT": dot}
    # Triton finds these divisibilities by itself at a launch; here they have to be said.
    attrs = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(signature) if name in ALIGNED}
    source = ASTSource(fn=int4_triton.int4_partials, signature=signature, constexprs=constants, attrs=attrs)
    compiled = triton.compile(source, target=target, options=int4_triton.OPTIONS)
    resources = cuda_resources(compiled) if target.backend == "cuda" else hip_resources(compiled.asm["amdgcn"])
    return resources | {"shared": compiled.metadata.shared}


def cuda_resources(compiled) -> dict[str, object]:
    ptx = compiled.asm["ptx"]
    copy = r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x\w+)"
    copies = [int(size, 16) for size in re.findall(copy, ptx)]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    cores = r"wgmma\.mma_async|mma\.sync\.aligned\.m16n8|tcgen05\.mma"
    return {
        "registers": registers,
        "spills": stack + local,
        "widest": max(copies, default=0),
        "tensor_cores": re.search(cores, ptx) is not None,
    }


def hip_resources(assembly: str) -> dict[str, object]:
    counts = ("vgpr_count", "vgpr_spill_count")
    registers, spills = (int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1]) for name in counts)
    widths = [4 * int(size or 1) for size in re.findall(r"global_load_dword(?:x(\d))?", assembly)]
    cores = "v_mfma" in assembly
    return {"registers": registers, "spills": spills, "widest": max(widths, default=0), "tensor_cores": cores}


if __name__ == "__main__":
    main()
