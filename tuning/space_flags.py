"""The flags of the search space, and the space that they make.

Those of the clippers are made from their own declarations.
"""

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from keras_gradclip.clippers import Parameter, selectable
from keras_gradclip.tuning.space import NONE, calibrated_ranges, layer_groups, searchable
from recipes.errors import RecipeError
from recipes.training import Recipe
from recipes.training.build import build_network


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
    """What is searched, and a flag for each parameter of the clippers; two may share one."""
    add = parser.add_argument_group("search space").add_argument
    add(
        "--clippers",
        nargs="+",
        metavar="NAME",
        default=["absolute", "exponential", "norm"],
        help=f"of {', '.join(selectable())}; none is always there (%(default)s)",
    )
    add(
        "--calibration",
        metavar="FILE",
        help="centre the thresholds' ranges on what keras_gradclip.calibrate saved there",
    )
    add("--search-gate", action="store_true", help="also search the activation gate")
    add("--groups", action="store_true", help="a threshold each for stem, stages and head")
    add(
        "--learning-rate-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="log (a third to three times the recipe's)",
    )
    add("--fix-learning-rate", action="store_true", help="search at the recipe's alone")
    add("--points", type=int, default=4, help="grid: values a number (%(default)s)")
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


def _varied(args: argparse.Namespace, clippers: list[str]) -> dict[str, Any]:
    """The given ranges and words, and of other words one each."""
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


def search_space(
    args: argparse.Namespace, recipe: Recipe, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of `clip_hyperparameters`.

    Args:
        args: of the search's command line.
        recipe: that is searched.
        given: its options that the user fixed.

    Raises:
        RecipeError: flags that do not go together.
    """
    clippers = ["none", *(name for name in args.clippers if name != "none")]
    options = recipe.options(**given)
    space = {
        "clippers": clippers,
        **(calibrated_ranges(args.calibration) if args.calibration else {}),
        **_varied(args, clippers),
        "activation_gate": args.search_gate,
        "points": args.points if args.tuner == "grid" else None,
        "groups": layer_groups(build_network(recipe, options, 10)) if args.groups else None,
    }
    if args.fix_learning_rate:
        if args.learning_rate_range:
            raise RecipeError("--learning-rate-range and --fix-learning-rate: give one of them")
        return space
    rate = options.learning_rate
    low, high = args.learning_rate_range or (rate / 3, rate * 3)
    if not low <= rate <= high:
        raise RecipeError(
            f"--learning-rate-range {low:g} {high:g}: must hold the baseline's learning rate, "
            f"{rate:g}; set that with --learning-rate"
        )
    return {**space, "learning_rate": (low, high), "default_learning_rate": rate}


def replacements() -> Iterator[tuple[str, str]]:
    """A recipe's option that the search sets itself, and the flag that takes its place."""
    for flag, owners in _by_flag().items():
        for _, parameter in owners:
            yield parameter.flag, flag
