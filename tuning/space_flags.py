"""The flags of the search space, made from the clippers' declarations, and the space itself."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from recipes.command_line import Parser
from recipes.errors import RecipeError
from recipes.plugin import declarations
from recipes.training import options as opts

Owners = list[tuple[str, declarations.Parameter]]


def _by_flag() -> dict[str, Owners]:
    """For each flag (named as in the namespace), its clippers and their parameters."""
    result: dict[str, Owners] = {}
    for alias, declaration in opts.clippers().items():
        for p in declaration.parameters:
            flag = f"{p.flag}s" if p.kind == "word" else f"{p.flag}_range"
            result.setdefault(flag, []).append((alias, p))
    return result


def add_flags(parser: argparse.ArgumentParser, argv: Sequence[str] = ()) -> None:
    """Adds the flags of the search space; clippers may share a flag.

    Args:
        parser: the command's parser.
        argv: its arguments: the help shows the flags of their `--clippers` only;
            `--help-clippers` shows those of all clippers.
    """
    group = parser.add_argument_group("search space")
    add = group.add_argument
    add(
        "--clippers",
        nargs="+",
        metavar="NAME",
        default=["absolute", "exponential", "norm"],
        help=f"of {', '.join(opts.clippers())}; none is always included (%(default)s)",
    )
    add(
        "--calibration",
        metavar="FILE",
        help="centre the thresholds' ranges on those that keras_gradclip.calibrate saved",
    )
    add("--search-gate", action="store_true", help="also search the activation gate")
    add("--groups", action="store_true", help="a separate threshold for stem, stages and head")
    add(
        "--learning-rate-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="log (a third to three times the recipe's)",
    )
    add("--fix-learning-rate", action="store_true", help="search at the recipe's own learning rate")
    add("--points", type=int, default=4, help="grid: values of each number (%(default)s)")
    early = Parser("", add_help=False)
    early.add_argument("--clippers", nargs="+", default=parser.get_default("clippers"))
    chosen = early.parse_known_args(argv)[0].clippers
    page = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
    every = page.add_argument_group("ranges and words to search")
    for owners in _by_flag().values():
        text, is_shown = _help(owners), any(alias in chosen for alias, _ in owners)
        owners[0][1].add_to(every, searched=True, help=text)
        owners[0][1].add_to(group, searched=True, help=text if is_shown else argparse.SUPPRESS)
    group.add_argument(
        "--help-clippers",
        action="version",
        version=page.format_help(),
        help="show the ranges of every clipper and exit",
    )


def _help(owners: Owners) -> str:
    first = owners[0][1]
    text = f"{', '.join(alias for alias, _ in owners)}: {first.help}"
    if first.kind == "word":
        words = dict.fromkeys(word or opts.NONE for _, p in owners for word in p.choices)
        return f"{text}; of {' '.join(words)} ({first.default or opts.NONE})"
    suggested = "; ".join(
        f"{a} {p.range[0]:g} {p.range[1]:g}" for a, p in owners if p.threshold and p.range
    )
    return f"{text}, {'log' if first.log else 'linear'} ({suggested or 'searched if given'})"


def check_flags(args: argparse.Namespace) -> None:
    """Checks the flags of the search space.

    Raises:
        RecipeError: one is out of its range, or contradicts another.
    """
    known = [opts.NONE, *opts.clippers()]
    _check_words("--clippers", args.clippers, known)
    for flag, owners in _by_flag().items():
        value, name = getattr(args, flag), opts.flag_of(flag)
        if value is None:
            continue
        aliases = [alias for alias, _ in owners]
        if not set(aliases) & set(args.clippers):
            raise RecipeError(f"{name} belongs to {' or '.join(aliases)}, not among --clippers")
        if owners[0][1].kind == "word":
            words = [word or opts.NONE for _, p in owners for word in p.choices]
            _check_words(name, value, list(dict.fromkeys(words)))
        elif not 0 <= value[0] < value[1] < float("inf"):
            low, high = value
            raise RecipeError(f"{name}: must be 0 <= low < high, but is {low:g} to {high:g}")
    if args.points < 2:
        raise RecipeError(f"--points {args.points}: must be 2 or more")
    if args.fix_learning_rate and args.learning_rate_range:
        raise RecipeError("--learning-rate-range and --fix-learning-rate: give one of them")


def _check_words(flag: str, words: Sequence[str], known: Sequence[str]) -> None:
    if len(set(words)) < len(words) or not set(words) <= set(known):
        some = " ".join(words)
        raise RecipeError(f"{flag} {some}: must be some of {', '.join(known)}, each at most once")


def _varied(args: argparse.Namespace, clippers: list[str]) -> dict[str, Any]:
    """The given ranges and words, by clipper and parameter."""
    result: dict[str, Any] = {}
    for flag, owners in _by_flag().items():
        value = getattr(args, flag)
        for alias, parameter in owners:
            if alias not in clippers:
                continue
            if value is not None:
                result[f"{alias}/{parameter.name}"] = value
    return result


def search_space(args: argparse.Namespace, recipe: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `clip_hyperparameters`.

    Args:
        args: the search's flags, parsed.
        recipe: the `Recipe` to search.
        given: its options that the user fixed.

    Raises:
        RecipeError: flags that contradict each other.
    """
    from keras_gradclip.tuning.space import calibrated_ranges, layer_groups
    from recipes.training.build import build_network

    clippers = [opts.NONE, *(name for name in args.clippers if name != opts.NONE)]
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
        return space
    rate = options.learning_rate
    return {**space, "learning_rate": rates(args, rate), "default_learning_rate": rate}


def rates(args: argparse.Namespace, rate: float) -> tuple[float, float]:
    """The lowest and highest learning rate of the search, around the baseline's.

    Raises:
        RecipeError: the given range does not contain the baseline's.
    """
    low, high = args.learning_rate_range or (rate / 3, rate * 3)
    if not low <= rate <= high:
        raise RecipeError(
            f"--learning-rate-range {low:g} {high:g}: must contain the baseline's learning rate, "
            f"{rate:g}; set that with --learning-rate"
        )
    return low, high


def replacements() -> Iterator[tuple[str, str]]:
    """Pairs of a recipe's option that the search sets, and the search's flag for it."""
    for flag, owners in _by_flag().items():
        for _, parameter in owners:
            yield parameter.flag, opts.flag_of(flag)
