"""Compressed models for other runtimes: written, then loaded by a process that knows nothing of circuitpress.

| format | what is written | who loads it |
|---|---|---|
| compressed-tensors | symmetric 4- and 8-bit integers in 32-bit words (packed.py) | transformers, vLLM |
| bitsandbytes | nf4 or int8 beside floating matrices (absmax.py) | transformers |
| gguf | the unrounded model, a type for every tensor, an importance matrix (gguf.py) | llama.cpp |
| dense | the numbers that the codes stand for | everything |

`source` reads a packed model, `write` builds the folder, `check` compares its logits in a fresh process (stranger.py).
"""

from .check import Checked
from .gguf import write_gguf
from .source import Source, open_source
from .write import EXPORTS, export, preview

__all__ = ["EXPORTS", "Checked", "Source", "export", "open_source", "preview", "write_gguf"]
