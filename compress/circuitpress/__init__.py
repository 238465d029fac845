"""Compress language models by what their parts do, with every decision priced in nats per predicted token.

`import circuitpress` teaches transformers to load compressed checkpoints: after it,
`AutoModelForCausalLM.from_pretrained(folder)` works as for any other model. The import itself loads neither torch nor
transformers; see `_register`.
"""

from ._register import register_with_transformers

__all__ = ["__version__"]
__version__ = "0.1.0"

register_with_transformers()
