"""The table of clippers in the docs, from their cards."""

from __future__ import annotations

from keras_gradclip.clippers.base import ALIASES, Clipper
from keras_gradclip.clippers.parameters import parameters


def table() -> str:
    """Markdown: a row for each registered clipper that has a card, composites last."""
    rows = [
        "| clipper | `--clipper` | what it does | when to use it | suggested | source |",
        "|---|---|---|---|---|---|",
    ]
    for alias, cls in sorted(ALIASES.items(), key=lambda item: not item[1].selectable):
        if cls.card is not None:
            name = f"`{alias}`" if cls.selectable else "–"
            cells = (f"`{cls.__name__}({_arguments(cls)})`", name, *cls.card)
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def _arguments(cls: type[Clipper]) -> str:
    """What a user sets most: the live parameters, or a composite's clippers."""
    return ", ".join(p.name for p in parameters(cls) if p.live or not p.help)
