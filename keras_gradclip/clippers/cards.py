"""Generated tables of clippers: for the docs, and `declarations.json` for command lines.

`python -m keras_gradclip.clippers.cards` writes the latter.
"""

from __future__ import annotations

from keras_gradclip.clippers.base import ALIASES, Clipper, selectable
from keras_gradclip.declarations import TABLE, Declaration, as_json, parameters


def declarations() -> dict[str, Declaration]:
    """The registered clippers that flags can create, by alias."""
    return {alias: Declaration.of(cls) for alias, cls in selectable().items()}


def table() -> str:
    """A Markdown table of the registered clippers with a card, composites last."""
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
    """The main arguments: live parameters, or a composite's clippers."""
    return ", ".join(p.name for p in parameters(cls) if p.live or not p.help)


if __name__ == "__main__":
    TABLE.write_text(as_json(declarations()), encoding="utf-8")
