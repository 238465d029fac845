"""What the compilers make of the kernels, without a GPU: registers, spills, shared memory, instructions a weight.

1. Triton compiles for a device that is not there; its wheel brings ptxas and cuobjdump.
2. Instructions are counted in the machine code of the loop over the weights: its instructions, times the threads, by
   the weights of one turn.
3. The budget is what an H200 can issue while it reads a weight: 132 multiprocessors * 128 instructions * 1.755 GHz by
   4.3 TB/s, or 6.9 a byte, with 1/8 bit of scales. Above it a kernel is slower than the memory, whatever else it does.

    python benchmarks/aot.py            writes results/kernels-aot.json (about 5 minutes on one core)
    python benchmarks/aot.py --quick    prints one json line for each of the cases that tests look at
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from circuitpress_kernels import (
    decode_triton,
    experts_triton,
    fused_launch_triton,
    fused_triton,
    kv_triton,
    launch_triton,
    slices_triton,
)
from circuitpress_kernels.kv import CacheForm
from circuitpress_kernels.launches import default
from circuitpress_kernels.slices import BOOK, DENSE, SPARSE, TILE_ROWS, TRELLIS, bits_of, fields_of

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""Bytes of shared memory that a program may have: CUDA programming guide, compute capabilities; CDNA 3 ISA guide."""
TYPES = {"fp16": tl.float16, "bf16": tl.bfloat16}
INSTRUCTIONS_A_BYTE = 132 * 128 * 1.755e9 / 4.3e12
RINGS = (TRELLIS + 4, TRELLIS + 5)
QUICK = (2, 3, 4, 8, BOOK + 2, BOOK + 3, BOOK + 4, TRELLIS + 4)
MIXED = (2, 3, 4, 8, DENSE)
POINTERS = {
    "x": "", "gathered": "", "weight": "", "y": "", "words": "*i16", "scales": "*fp16", "zeros": "*u8",
    "pieces": "*i32", "programs": "*i32", "partials": "*fp32", "order": "*i32", "tiles": "*i32", "columns": "*i32",
    "bias": "*fp32", "gain": "", "out": "", "residual": "", "numbers": "", "sources": "*i32", "factors": "*fp32",
    "places": "*i32", "starts": "*i32", "active": "*i32", "choices": "*i32", "codes": "*u8", "table": "*i32",
    "eps": "fp32",
}  # fmt: skip
"""Types of the kernels' pointers, and of what is no int32; those of activations have the case's type."""
AROUND = ("add_pieces", "finish_experts", "finish_rows", "prepare_row", "read_block")
"""Kernels that read no packed weights."""
STREAMS = ("slice_pieces", "expert_pieces")
"""Kernels that read them."""
CONSTANTS = {
    "finish_experts": {"BLOCK": experts_triton.FINISHED, "GATED": True},
    "finish_rows": {"BLOCK": fused_launch_triton.FINISHED, "RESIDUAL": True, "GATED": True},
    "prepare_row": {
        "NORM": True,
        "TURN": True,
        "WIDE": 4096,
        "BLOCK": 128,
        "LOG": 7,
        "BLOCKS": fused_launch_triton.BLOCKS,
    },
    "read_block": kv_triton.cache_constants(CacheForm((4, 8) * 4, 128, 64)),
}
ALIGNED = ("stride", "cols", "rows", "turned", "width", "code_stride", "scale_stride")
"""Numbers that Triton finds divisible by 16 at a launch for the usual sizes."""


class Case(NamedTuple):
    """A kernel and what it is compiled for."""

    name: str
    kinds: tuple[int, ...]
    size: int
    type: str
    target: str


def main() -> None:
    quick = "--quick" in sys.argv
    rows = []
    for case in cases(quick=quick):
        rows.append(inspect(case))
        sys.stdout.write(json.dumps(rows[-1]) + "\n")
        sys.stdout.flush()
    if not quick:
        from common import save_results

        save_results(Path(__file__).with_name("results") / "kernels-aot.json", rows, triton=triton.__version__)


def cases(*, quick: bool) -> Iterator[Case]:
    """All kernels, on most targets for bfloat16 only; with `quick`, those that the others follow from."""
    whole = (2, 3, 4, 5, 6, 8, DENSE, SPARSE, *range(BOOK + 2, BOOK + 5), *RINGS)
    for target in TARGETS:
        main, hip = target == "sm_90", target == "gfx942"
        widest = 64 if hip else 128
        for type_ in ("fp16",) if main and quick else ("fp16", "bf16") if main else ("bf16",):
            for kind in (QUICK if main else (4,)) if quick else (2, 3, 4, 8) if hip else whole:
                size = widest // 2 if kind != SPARSE and fields_of(kind) == 16 else widest
                yield Case("slice_pieces", (kind,), size, type_, target)
                if kind == 4 and (main or not quick):
                    yield Case("expert_pieces", (kind,), size, type_, target)
            if main or not (quick or hip):
                yield Case("slice_pieces", MIXED, 64, type_, target)
            for name in AROUND if main or hip or not quick else AROUND[:1]:
                yield Case(name, (), 128, type_, target)
            if not quick:
                yield Case("decode_pieces", (4,), 128, type_, target)
                yield Case("gather_activations", (), 128, type_, target)


def inspect(case: Case) -> dict[str, Any]:
    """One row of the table."""
    target = TARGETS[case.target]
    modules = slices_triton, decode_triton, experts_triton, fused_triton, kv_triton
    kernel = next(getattr(module, case.name) for module in modules if hasattr(module, case.name))
    hip = target.backend == "hip"
    kinds = sum(1 << kind for kind in case.kinds)
    streams = case.name in STREAMS
    options: dict[str, Any] = launch_triton.options(default(kinds, hip=hip)) if streams else launch_triton.OTHER_OPTIONS
    constants = {
        "KINDS": kinds, "ROWS": TILE_ROWS, "SIZE": case.size, "EVEN": True, "SHIFT": 0,
        "BATCH": launch_triton.rows_of_a_pass(hip), "BFLOAT": case.type == "bf16", "ASM": not hip,
        "DOT": TYPES[case.type], "BIAS": True, "BLOCK": 1024,
    } | CONSTANTS.get(case.name, {})  # fmt: skip
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: POINTERS.get(name, "i32") or f"*{case.type}" for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    found = compile_for(kernel, signature, constants, options, target, aligned=(*(set(POINTERS) - {"eps"}), *ALIGNED))
    kind = case.kinds[0] if case.kinds else SPARSE
    bits = None if kind == SPARSE else (kind - TRELLIS) / 2 if kind > TRELLIS else bits_of(kind)
    turn = TILE_ROWS * case.size * fields_of(kind) if bits else 0
    loop = found.pop("loop", None)
    row = {"kernel": case.name, "target": case.target, "type": case.type, "kinds": list(case.kinds)} | found
    row["shared_limit"] = SHARED_LIMIT[case.target]
    if loop and case.name in STREAMS and len(case.kinds) == 1 and bits:
        threads = 32 * options["num_warps"]
        row["instructions_per_weight"] = round(len(loop) * threads / turn, 2)
        row["budget"] = round(INSTRUCTIONS_A_BYTE * (bits + 0.125) / 8, 2)
    if loop is not None:
        row["spills_in_loop"] = sum(name in ("LDL", "STL") for name in loop)
    return row


def compile_for(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], options: dict[str, Any], target: GPUTarget,
    *, aligned: tuple[str, ...],
) -> dict[str, Any]:  # fmt: skip
    """Compiles a kernel and returns what it takes of the device."""
    # Triton finds these divisibilities by itself at a launch; here they have to be said.
    attrs = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(signature) if name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    compiled = triton.compile(source, target=target, options=options)
    resources = cuda_resources(compiled) if target.backend == "cuda" else hip_resources(compiled.asm["amdgcn"])
    return resources | {"shared": compiled.metadata.shared}


def cuda_resources(compiled: Any) -> dict[str, Any]:
    """Registers, bytes of spills, widest copy to shared memory, tensor cores, instructions of the longest inner loop.

    The last under `loop`, as names.
    """
    ptx = compiled.asm["ptx"]
    copy = r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x\w+)"
    copies = [int(size, 16) for size in re.findall(copy, ptx)]
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, code = (
            subprocess.run([tool, flag, cubin.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers, stack, local = (_number(rf"{name}:(\d+)", usage) for name in ("REG", "STACK", "LOCAL"))
    cores = r"wgmma\.mma_async|mma\.sync\.aligned\.m16n8|tcgen05\.mma"
    return {
        "registers": registers,
        "spills": stack + local,
        "widest": max(copies, default=0),
        "tensor_cores": re.search(cores, ptx) is not None,
        "loop": _longest_loop(code),
    }


def hip_resources(assembly: str) -> dict[str, Any]:
    """The same, without instructions, for AMD's assembly."""
    registers, spills = (_number(rf"\.{name}:\s+(\d+)", assembly) for name in ("vgpr_count", "vgpr_spill_count"))
    widths = [4 * int(size or 1) for size in re.findall(r"global_load_dword(?:x(\d))?", assembly)]
    cores = "v_mfma" in assembly
    return {"registers": registers, "spills": spills, "widest": max(widths, default=0), "tensor_cores": cores}


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, pattern
    return int(found[1])


def _longest_loop(code: str) -> list[str]:
    """The names of the instructions of the longest loop that holds no other, from a listing of machine code."""
    line = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]*)(.*?);")
    listing = [(int(at, 16), name, rest) for at, name, rest in line.findall(code)]
    loops = []
    for at, name, rest in listing:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target and int(target[1], 16) < at:
            loops.append((int(target[1], 16), at))
    inner = [(a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]
    first, last = max(inner, key=lambda loop: loop[1] - loop[0], default=(0, -1))
    return [name.split(".")[0] for at, name, _ in listing if first <= at <= last]


if __name__ == "__main__":
    main()
