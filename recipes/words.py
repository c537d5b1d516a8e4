"""Wording and tables of messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # slow imports that flags do not need
    import pandas as pd
    from rich.console import Console


def counted(number: int, noun: str) -> str:
    """`"1 epoch"`, `"2 epochs"`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def show_table(table: pd.DataFrame, title: str, console: Console | None = None) -> None:
    """Prints a table of text; the first column is left-aligned, the others right-aligned."""
    from rich.console import Console
    from rich.table import Table

    page = Table(title=title)
    for number, name in enumerate(table.columns):
        page.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in table.to_numpy():
        page.add_row(*row)
    (console or Console(markup=False)).print(page)
