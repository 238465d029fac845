"""Adapters of other people's compressors, one small file each; `protocol` says what one is.

The files are run, not imported, by circuitpress: `python -m peers job.json` with the interpreter of that
peer's environment and this folder's parent on the path. They import torch, safetensors and their peer only.
"""
