"""The terms that a compressed model inherits: which licence its base has, and what that asks of those who pass it on.

A compressed checkpoint is a derivative of its base. Most licences ask for a copy of themselves and of the notices,
which travel in the model folder; some also ask for a name, a line on the page or a file of their own. Those are checked
here, because a repository that breaks them is easily made and hard to take back. This is no legal advice.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Terms:
    """What the base's licence asks: its Hub id (None if unknown), what a name must begin with, lines for the card."""

    licence: str | None
    name_prefix: str | None = None
    lines: tuple[str, ...] = ()
    needs_copy: bool = False
    """Whether the licence's text has to be in the repository."""

    def problems(self, name: str, files: tuple[str, ...]) -> list[str]:
        """What is wrong with publishing under `name` the files called `files`."""
        found = []
        if self.name_prefix and not _plain(name).startswith(_plain(self.name_prefix)):
            found.append(f"the licence {self.licence} asks for a name that begins with {self.name_prefix}: {name}")
        if self.needs_copy and not any(file.upper().startswith(("LICENSE", "LICENCE")) for file in files):
            found.append(f"the licence {self.licence} asks for a copy of itself, and there is no LICENSE file")
        return found


def _plain(name: str) -> str:
    """Without case and punctuation: repositories cannot be called `Llama 3`."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


_LLAMA = ("Built with Llama.",)
_RULES: Mapping[str, Terms] = {
    "llama2": Terms("llama2", None, (), needs_copy=True),
    "llama3": Terms("llama3", "Llama 3", ("Built with Meta Llama 3.",), needs_copy=True),
    "llama3.1": Terms("llama3.1", "Llama", _LLAMA, needs_copy=True),
    "llama3.2": Terms("llama3.2", "Llama", _LLAMA, needs_copy=True),
    "llama3.3": Terms("llama3.3", "Llama", _LLAMA, needs_copy=True),
    "llama4": Terms("llama4", "Llama", _LLAMA, needs_copy=True),
    "gemma": Terms("gemma", None, ("Use is subject to the Gemma Terms of Use and Prohibited Use Policy.",), True),
    "apache-2.0": Terms("apache-2.0", None, (), needs_copy=True),
}
"""Hub licence id -> terms (Llama 3 licence, section 1.b.i asks for "Llama 3" at the front of the name; 3.1 and later
for "Llama"). What is not listed asks for nothing that can be checked here."""
_HEADINGS = (
    (r"LLAMA 2 COMMUNITY LICENSE", "llama2"),
    (r"META LLAMA 3 COMMUNITY LICENSE", "llama3"),
    (r"LLAMA 3\.1 COMMUNITY LICENSE", "llama3.1"),
    (r"LLAMA 3\.2 COMMUNITY LICENSE", "llama3.2"),
    (r"LLAMA 3\.3 COMMUNITY LICENSE", "llama3.3"),
    (r"LLAMA 4 COMMUNITY LICENSE", "llama4"),
    (r"Gemma Terms of Use", "gemma"),
    (r"Apache License\s+Version 2\.0", "apache-2.0"),
    (r"MIT License|Permission is hereby granted, free of charge", "mit"),
)


def terms_of(*folders: Path, licence: str | None = None) -> Terms:
    """The terms of the model in the first of `folders` that says any; `licence` is the user's own word on it.

    Read from the front matter of README.md, else recognised from the text of a LICENSE file.
    """
    for folder in folders if licence is None else ():
        licence = licence or _from_card(folder / "README.md") or _from_text(folder)
    return Terms(None) if licence is None else _RULES.get(licence, Terms(licence))


def front_matter(readme: Path) -> Mapping[str, Any]:
    """The YAML at the head of a model card; {} without one."""
    if not readme.is_file():
        return {}
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        found = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _from_card(readme: Path) -> str | None:
    licence = front_matter(readme).get("license")
    return licence if isinstance(licence, str) and licence != "other" else None


def _from_text(folder: Path) -> str | None:
    for file in sorted([*folder.glob("LICENSE*"), *folder.glob("LICENCE*")]):
        head = file.read_text(encoding="utf-8", errors="replace")[:4000]
        for pattern, licence in _HEADINGS:
            if re.search(pattern, head, re.IGNORECASE):
                return licence
    return None
