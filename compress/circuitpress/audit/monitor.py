"""Does this input look like the text the model was judged on? Distances of activations, and rates of features.

1. `fit_monitor` reads the activations of a site on reference text and keeps their mean and covariance (shrunk towards a
   multiple of the identity by the formula of Ledoit and Wolf, 2004, so that few tokens and many numbers do).
2. `surprise` of a window is the mean over its tokens of the squared Mahalanobis distance (x - m)^T C^-1 (x - m) / d,
   about 1 for text like the reference's. With an SAE, also the total variation between the window's shares of fired
   features and those of the reference.
3. The threshold is a quantile of windows that were not fitted. How often it flags unseen reference text, the false
   positive rate, is measured on a third part, with its standard error: it is stated, not assumed.

Correlational: unusual is not wrong, and a harmful input can look ordinary. Simple detectors do about as well as learned
ones in the comparisons there are (arXiv 2504.08812), none of them everywhere.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..console import Advance, ignore
from ..errors import CircuitpressError
from ..files import write_bytes_atomic
from ..mech.sae import Sae
from ..mech.sites import Site, collect
from ..stream import Stream

SKIP = 1
"""Positions at the start of a window that are left out: attention sinks are a hundred times as long as other states."""


@dataclass(frozen=True)
class Monitor:
    """The record of one site: mean [d], precision [d, d] (inverse covariance), rates [features] of an SAE or None.

    `thresholds` by measure (`distance`, `features`) flag `quantile` of windows; `false_positives` is what they flagged
    of unseen windows of the reference, `stderr` its standard error.
    """

    site: Site
    mean: Tensor
    precision: Tensor
    rates: Tensor | None
    thresholds: dict[str, float]
    false_positives: dict[str, float]
    stderr: float
    quantile: float
    windows: int


@torch.no_grad()
def fit_monitor(
    stream: Stream, windows: Tensor, site: Site, *, sae: Sae | None = None, quantile: float = 0.95,
    advance: Advance = ignore,
) -> Monitor:  # fmt: skip
    """Fits on half of `windows` int64 [n, length], sets thresholds on a quarter, measures on the last quarter.

    Raises CircuitpressError for fewer than 16 windows.
    """
    if len(windows) < 16:
        raise CircuitpressError(f"{len(windows)} windows are too few for a monitor", hint="give 16 or more")
    x = _activations(stream, windows, site, advance)
    half, quarter = len(x) // 2, len(x) // 4
    fitted = x[:half].flatten(0, 1).double()
    mean = fitted.mean(0)
    covariance = shrunk_covariance(fitted - mean)
    rates = None if sae is None else (sae.encode(fitted.float())[0] > 0).double().mean(0)
    blank = Monitor(site, mean, torch.linalg.inv(covariance), rates, {}, {}, 0.0, quantile, len(windows))
    seen = _measures(blank, x[half:], sae)
    thresholds = {name: float(np.quantile(values[:quarter], quantile)) for name, values in seen.items()}
    flagged = {name: float((values[quarter:] > thresholds[name]).mean()) for name, values in seen.items()}
    count = len(x) - half - quarter
    stderr = (quantile * (1 - quantile) / count) ** 0.5
    return Monitor(site, mean, blank.precision, rates, thresholds, flagged, stderr, quantile, len(windows))


@torch.no_grad()
def surprise(
    stream: Stream, windows: Tensor, monitor: Monitor, *, sae: Sae | None = None, advance: Advance = ignore
) -> dict[str, "np.ndarray[tuple[int], np.dtype[np.float64]]"]:
    """How unusual each of `windows` int64 [n, length] is, by measure; compare with `monitor.thresholds`."""
    site = monitor.site
    if site.width(stream.anatomy) != len(monitor.mean):
        raise CircuitpressError(
            f"the monitor knows {len(monitor.mean)} numbers at {site}, this model has {site.width(stream.anatomy)}",
            hint="fit one on this model: circuitpress monitor fit MODEL --site ...",
        )
    return _measures(monitor, _activations(stream, windows, site, advance), sae)


def shrunk_covariance(centred: Tensor) -> Tensor:
    """The covariance [d, d] of rows [n, d] with mean zero, shrunk towards the identity times its mean variance.

    The share of the target is the estimate of Ledoit and Wolf (2004): the error of the sample covariance over its
    distance from the target.
    """
    n, d = centred.shape
    sample = centred.T @ centred / n
    variance = sample.trace() / d
    target = variance * torch.eye(d, dtype=sample.dtype, device=sample.device)
    distance = (sample - target).square().sum()
    # sum_t |x_t x_t^T - S|^2 = sum_t |x_t|^4 - n |S|^2
    error = (centred.square().sum(1).square().sum() - n * sample.square().sum()) / n**2
    share = float((error / distance.clamp(min=1e-300)).clamp(0, 1))
    return (1 - share) * sample + share * target


def save_monitor(monitor: Monitor, path: Path) -> None:
    """Writes a monitor as one safetensors file."""
    tensors = {"mean": monitor.mean, "precision": monitor.precision}
    tensors |= {} if monitor.rates is None else {"rates": monitor.rates}
    names = ("thresholds", "false_positives", "stderr", "quantile", "windows")
    fields = {"site": str(monitor.site)} | {name: getattr(monitor, name) for name in names}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(path, save(tensors, metadata={"monitor": json.dumps(fields)}))


def load_monitor(path: Path) -> Monitor:
    """The inverse of `save_monitor`; CircuitpressError for a file that is none."""
    try:
        with safe_open(path, framework="pt") as file:
            fields = json.loads(file.metadata()["monitor"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        hint = "make one: circuitpress monitor fit MODEL --site L4.resid_post --out FILE"
        raise CircuitpressError(f"{path} is not a monitor: {error}", hint=hint) from error
    site = Site.parse(fields.pop("site"))
    return Monitor(site, tensors["mean"], tensors["precision"], tensors.get("rates"), **fields)


def _activations(stream: Stream, windows: Tensor, site: Site, advance: Advance) -> Tensor:
    """[windows, length - SKIP, d] in float32."""
    batches = stream.batches(windows)
    store = collect(stream, batches, [site], advance=advance)
    return torch.cat([store.get((str(site), b))[:, SKIP:].float().cpu() for b in range(len(batches))])


def _measures(
    monitor: Monitor, x: Tensor, sae: Sae | None
) -> dict[str, "np.ndarray[tuple[int], np.dtype[np.float64]]"]:
    centred = x.double() - monitor.mean
    distance = ((centred @ monitor.precision) * centred).sum(-1).mean(1) / x.shape[-1]
    found = {"distance": distance.numpy()}
    if monitor.rates is not None and sae is not None:
        rates = torch.stack([(sae.encode(window)[0] > 0).double().mean(0) for window in x])
        own, known = rates / rates.sum(1, keepdim=True).clamp(min=1e-9), monitor.rates / monitor.rates.sum()
        found["features"] = (0.5 * (own - known).abs().sum(1)).numpy()
    return found
