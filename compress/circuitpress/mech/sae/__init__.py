"""Sparse autoencoders: the activations of a site as sparse sums of learnt directions.

`value` is the autoencoder, `formats` reads and writes what others publish, `rows` and `train` learn one, `judge` says
how much of the model survives its reconstruction, `attribute` what its features contribute, `steer` adds them.
"""

from .formats import load_sae, save_sae
from .value import Sae

__all__ = ["Sae", "load_sae", "save_sae"]
