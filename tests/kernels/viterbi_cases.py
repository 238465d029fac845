"""Runs the Triton encoder beside the torch one and prints one json line a case; not a test, but what two tests run.

`python viterbi_cases.py cpu` with TRITON_INTERPRET=1 set goes through Triton's interpreter, `python viterbi_cases.py
cuda` through a GPU. A process of its own for the reasons that processes.py gives.

What the kernels write is poisoned with NaN (and codes with 255) before the launch.
"""

import json
import sys

import torch

from circuitpress.quantize import viterbi
from circuitpress_kernels import viterbi_triton
from circuitpress_kernels.trellis import SPREAD, trellis_states, trellis_table

SMALL = (  # memory, code bits, width, steps, sequences, states of one inner step
    (5, 2, 1, 9, 6, 4096),
    (6, 2, 1, 24, 2, 16),
    (6, 3, 2, 8, 5, 4096),
    (6, 4, 1, 7, 1, 64),
    (7, 5, 2, 6, 4, 32),
)
LARGE = ((12, 2, 1, 128, 300, 4096), (12, 3, 1, 128, 40, 4096), (13, 5, 2, 64, 40, 4096), (16, 4, 1, 128, 20, 4096))


def main(device: str) -> None:
    torch.set_num_threads(1)
    for case in SMALL if device == "cpu" else SMALL + LARGE:
        sys.stdout.write(json.dumps(run(*case, device)) + "\n")


def run(memory: int, code_bits: int, width: int, steps: int, count: int, states: int, device: str) -> dict[str, object]:
    generator = torch.Generator().manual_seed(memory * steps)
    x = torch.randn(count, steps * width, generator=generator)
    weights = torch.rand(count, steps * width, generator=generator)
    table = trellis_table(memory, width) / SPREAD
    twin = viterbi.encode(x, table, code_bits=code_bits, weights=weights)
    features = torch.cat([table.square(), table], 1).to(device)
    terms = torch.cat([weights.view(count, steps, width), (-2 * weights * x).view(count, steps, width)], 2)
    viterbi_triton.STATES = states
    restore = poison()
    found = viterbi._ring(
        terms.permute(1, 2, 0).to(device),
        lambda terms, held, last: viterbi_triton.viterbi_search(terms, features, held, code_bits=code_bits, last=last),
    ).T.cpu()
    restore()
    mine, other = (error(x, weights, codes, table, code_bits) for codes in (found, twin))
    return {
        "case": f"L={memory} B={code_bits} V={width} {count}x{steps}",
        "error": float(((mine - other).abs() / other).max()),
        "same": float((found == twin).float().mean()),
        "right_form": list(found.shape) == [count, steps] and found.dtype == torch.uint8,
    }


def error(x: torch.Tensor, weights: torch.Tensor, codes: torch.Tensor, table: torch.Tensor, bits: int) -> torch.Tensor:
    states = trellis_states(codes, code_bits=bits, memory=len(table).bit_length() - 1)
    return (weights * (table[states].flatten(1) - x).square()).double().sum(1)


def poison():
    """Makes what the wrapper allocates start as NaN or 255, until the function that is returned is called."""
    new_empty, empty = torch.Tensor.new_empty, torch.empty

    def spoilt(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 255)

    torch.Tensor.new_empty = lambda self, *size, **options: spoilt(new_empty(self, *size, **options))
    torch.empty = lambda *size, **options: spoilt(empty(*size, **options))

    def restore() -> None:
        torch.Tensor.new_empty, torch.empty = new_empty, empty

    return restore


if __name__ == "__main__":
    main(sys.argv[1])
