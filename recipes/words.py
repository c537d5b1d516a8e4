"""Wording shared by messages and tables."""


def counted(number: int, noun: str) -> str:
    """`"1 epoch"`, `"2 epochs"`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
