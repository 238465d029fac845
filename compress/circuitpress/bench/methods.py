"""Which peers run, in which settings, at which widths.

Every peer runs at the settings that its users take, and the calibrated ones also at those that make it best: groups of
32 cost a third of a bit more and are the better half of their front at 3 and 4 bits.
"""

from collections.abc import Sequence
from dataclasses import replace

from ..errors import CircuitpressError
from .jobs import Setting

CALIBRATED = ("autoround", "gptqmodel", "llmcompressor", "optimum-gptq")
PEERS = (*CALIBRATED, "llama.cpp", "hqq", "torchao", "quanto", "bitsandbytes", "gguf")

ABSENT = {
    "exllamav3": "EXL3 quantizes and runs on CUDA only",
    "qtip": "QTIP quantizes and runs on CUDA only",
}
"""Peers that have a row and no figure: our own uniform trellis with a plain Hessian stands in for both."""


def settings(peers: Sequence[str], bits: Sequence[int], *, groups: Sequence[int] = (64, 32)) -> list[Setting]:
    """The settings of `peers` at the widths `bits`; `groups` are the group sizes of the calibrated ones, best first.

    Raises CircuitpressError for a peer that there is none of.
    """
    unknown = [name for name in peers if name not in PEERS]
    if unknown:
        raise CircuitpressError(f"{', '.join(unknown)}: no such peer", hint=f"there are {', '.join(PEERS)}")
    found = [setting for name in peers for width in bits for setting in _MAKERS[name](width, groups)]
    return [setting for setting in found if setting.bits in bits]


def _autoround(bits: int, groups: Sequence[int]) -> list[Setting]:
    # 200 iterations are its default: most of all the time that peers take.
    return [_calibrated("autoround", "auto-round", bits, g, iters=200, sym=False) for g in groups]


def _gptqmodel(bits: int, groups: Sequence[int]) -> list[Setting]:
    plain = [_calibrated("gptqmodel", "gptqmodel", bits, g, sym=False) for g in groups]
    return [*plain, _calibrated("gptqmodel", "gptqmodel", bits, groups[0], " GPTAQ", sym=False, gptaq=True)]


def _llmcompressor(bits: int, groups: Sequence[int]) -> list[Setting]:
    return [_calibrated("llmcompressor", "llmcompressor", bits, g, sym=False) for g in groups]


def _optimum(bits: int, groups: Sequence[int]) -> list[Setting]:
    setting = _calibrated("optimum_gptq", "gptqmodel", bits, groups[0], sym=False)
    return [_named(setting, "optimum-gptq")]


def _hqq(bits: int, groups: Sequence[int]) -> list[Setting]:
    return [Setting("hqq", f"g{g}", "hqq", "light", bits, g, {"axis": 1}) for g in groups]


def _torchao(bits: int, groups: Sequence[int]) -> list[Setting]:
    return [
        Setting("torchao", f"g{groups[0]} {name}", "torchao", "light", bits, groups[0], {"algorithm": name})
        for name in ("affine", "hqq_scale_only")
    ]


def _quanto(bits: int, groups: Sequence[int]) -> list[Setting]:
    names = ("max", "hqq") if bits in (2, 4) else ()  # there is no qint3
    return [Setting("quanto", name, "quanto", "light", bits, groups[0], {"optimizer": name}) for name in names]


def _bitsandbytes(bits: int, groups: Sequence[int]) -> list[Setting]:
    del groups
    kinds = (("nf4", False), ("nf4", True)) if bits == 4 else ()
    return [
        Setting(
            "bitsandbytes", f"{kind}{' double' if double else ''}", "bitsandbytes", "light", bits, 64,
            {"type": kind, "double": double},
        )
        for kind, double in kinds
    ]  # fmt: skip


def _gguf(bits: int, groups: Sequence[int]) -> list[Setting]:
    del groups
    kinds = ("Q4_0", "Q4_1", "MXFP4") if bits == 4 else ()
    return [Setting("gguf", kind, "gguf", "light", bits, 32, {"type": kind}, padded=True) for kind in kinds]


def _llama_cpp(bits: int, groups: Sequence[int]) -> list[Setting]:
    del groups
    kinds = {2: ("Q2_K", "IQ2_S"), 3: ("Q3_K", "IQ3_S"), 4: ("Q4_K", "IQ4_XS", "IQ4_NL")}.get(bits, ())
    return [
        Setting(
            "llama.cpp", kind, "llamacpp", "llama-cpp", bits, 32 if kind == "IQ4_NL" else 256, {"type": kind},
            padded=True,
        )
        for kind in kinds
    ]  # fmt: skip


def _calibrated(adapter: str, environment: str, bits: int, group: int, note: str = "", **options: object) -> Setting:
    return Setting(adapter, f"g{group} asym{note}", adapter, environment, bits, group, options, padded=True)


def _named(setting: Setting, method: str) -> Setting:
    return replace(setting, method=method)


_MAKERS = {
    "autoround": _autoround,
    "gptqmodel": _gptqmodel,
    "llmcompressor": _llmcompressor,
    "optimum-gptq": _optimum,
    "llama.cpp": _llama_cpp,
    "hqq": _hqq,
    "torchao": _torchao,
    "quanto": _quanto,
    "bitsandbytes": _bitsandbytes,
    "gguf": _gguf,
}
