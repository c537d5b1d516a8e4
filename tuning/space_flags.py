"""The flags of the search space, made from the clippers' own declarations."""

import argparse
from collections.abc import Iterator
from typing import Any

from keras_gradclip.clippers import Parameter
from keras_gradclip.tuning.space import NONE, searchable


def flag_of(parameter: Parameter) -> str:
    """`--max-norm-range` for a number, `--rescales` for a word."""
    name = parameter.flag.replace("_", "-")
    return f"--{name}s" if parameter.kind == "word" else f"--{name}-range"


def _by_flag() -> dict[str, list[tuple[str, Parameter]]]:
    """For each flag, the clippers that have it with their parameters."""
    owners: dict[str, list[tuple[str, Parameter]]] = {}
    for alias, parameters in searchable().items():
        for parameter in parameters.values():
            owners.setdefault(flag_of(parameter), []).append((alias, parameter))
    return owners


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each parameter of the registered clippers; two may share one."""
    add = parser.add_argument_group("search space").add_argument
    for flag, owners in _by_flag().items():
        who = ", ".join(alias for alias, _ in owners)
        parameter = owners[0][1]
        text = f"{who}: {parameter.help}".replace("%", "%%")
        if parameter.kind == "word":
            words = dict.fromkeys(w or NONE for _, p in owners for w in p.choices)
            text += f"; of {' '.join(words)} ({parameter.default or NONE})"
            add(flag, nargs="+", metavar="WORD", help=text)
            continue
        scale = "log" if parameter.log else "linear"
        suggested = "; ".join(f"{a} {p.range[0]:g} {p.range[1]:g}" for a, p in owners if p.range)
        text += f", {scale} ({suggested or 'not searched'})"
        add(flag, type=float, nargs=2, metavar=("LOW", "HIGH"), help=text)


def varied(args: argparse.Namespace, clippers: list[str]) -> dict[str, Any]:
    """What `clip_hyperparameters` varies: the given ranges and words, and of other words one each.

    Args:
        args: of the command line.
        clippers: that are searched.
    """
    result: dict[str, Any] = {}
    for flag, owners in _by_flag().items():
        value = getattr(args, flag.lstrip("-").replace("-", "_"))
        for alias, parameter in owners:
            if alias not in clippers:
                continue
            if value is not None:
                result[f"{alias}/{parameter.name}"] = value
            elif parameter.kind == "word":
                result[f"{alias}/{parameter.name}"] = [parameter.default or NONE]
    return result


def replacements() -> Iterator[tuple[str, str]]:
    """A recipe's option that the search sets itself, and the flag that takes its place."""
    for flag, owners in _by_flag().items():
        for _, parameter in owners:
            yield parameter.flag, flag
