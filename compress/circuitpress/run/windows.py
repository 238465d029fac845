"""Windows of a run, kept: a text is tokenised once, not by every command that needs it.

64 MiB of text take a minute. The file is named by the digest of all that decides what is in it.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import sha256, write_bytes_atomic

if TYPE_CHECKING:
    import circuitpress.data

_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template.*")


def kept_windows(
    folder: Path, checkpoint: Path, text: Path | None, settings: Mapping[str, object],
    load: "Callable[[], circuitpress.data.Windows]",
) -> "circuitpress.data.Windows":  # fmt: skip
    """What `load` returns, or what it returned before; it may depend on the two paths and `settings`, nothing else."""
    from safetensors import safe_open
    from safetensors.torch import save

    from ..data import Windows, text_digest

    files = sorted({path for pattern in _TOKENIZER for path in checkpoint.glob(pattern)})
    parts = {path.name: sha256(path) for path in files}
    key = json.dumps({"text": text_digest(text), "tokenizer": parts, **settings}, sort_keys=True)
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    if path.exists():
        with safe_open(path, framework="pt") as file:
            return Windows(file.get_tensor("ids"), **json.loads(file.metadata()["windows"]))
    windows = load()
    fields = {name: getattr(windows, name) for name in ("source", "format", "text_sha256", "bos")}
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(path, save({"ids": windows.ids.contiguous()}, metadata={"windows": json.dumps(fields)}))
    return windows
