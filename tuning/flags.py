"""The flags of the search, their checks, and the search space; no TensorFlow is needed.

The flags of the search space are made from the clippers' declarations.
"""

import argparse
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.command_line import Parser
from recipes.errors import RecipeError
from recipes.plugin import declarations
from recipes.registry import RECIPES, find_recipe
from recipes.training import options as opts

Owners = list[tuple[str, declarations.Parameter]]

#: Long enough to compare thresholds, and done in minutes on two cores.
SMALL = {"epochs": 2, "limit_steps": 100}
# Recipe options set by the search, besides the clippers' parameters; and the flags to use instead.
_SEARCHED = {
    "clipper": "--clippers",
    "clip_config": "--clippers",
    "activation_gate": "--search-gate",
    "gate_clip_value": "--search-gate",
    "gate_gamma": "--search-gate",
    "resume": "the same command again, which resumes by itself",
}


def _option(name: str, default: Any, help: str, kind: type = str, **more: Any) -> opts.Option:
    return opts.Option(name, kind, default, help, **more)


OPTIONS = {
    "search": (
        _option("recipe", "alexnet", "its name, or a file that defines RECIPE"),
        _option(
            "tuner",
            "random",
            "the algorithm that chooses the next trial",
            choices=("random", "bayesian", "hyperband", "grid"),
        ),
        _option("max_trials", None, "with the baseline (default: 10; of a grid: all)", int, low=2),
        _option("objective", None, "a column of history.csv (default: the recipe's monitor)"),
        _option("direction", None, "of an objective of unknown direction", choices=("max", "min")),
        _option(
            "budget",
            "small",
            "small: 2 epochs of 100 steps unless given; full: the recipe's own",
            choices=("small", "full"),
        ),
        _option("executions", 1, "runs of each trial", int, low=1),
        _option(
            "confirm_runs",
            5,
            "runs with other seeds of the best clipped and of the best unclipped trial, at the "
            "end; 4 or more test whether clipping matters",
            int,
            low=0,
        ),
        _option("output", None, "folder of the search (default: runs/search-RECIPE)"),
        _option("keep_weights", False, "keep best.keras of each run", bool),
        _option("workers", 0, "worker processes to start on this machine", int, low=0),
        _option(
            "worker_timeout",
            60.0,
            "seconds after which the trial of a silent worker goes to another worker",
            float,
            above=0,
        ),
        _option("traceback", False, "print the traceback of an error", bool),
    ),
    "search space": (
        _option("calibration", None, "centre the ranges of thresholds on this file of `calibrate`"),
        _option("search_gate", False, "also search the activation gate", bool),
        _option("groups", False, "a separate threshold for stem, stages and head", bool),
        _option("fix_learning_rate", False, "search at the recipe's own learning rate", bool),
        _option("points", None, "grid: values per number (default: 4)", int, low=2),
    ),
}


def build_parser(description: str, argv: Sequence[str] = ()) -> Parser:
    """The parser of the search's own flags; all others are left to the recipe.

    The help shows the range flags of the `--clippers` in `argv`; `--help-clippers` shows all.
    """
    parser = Parser(
        "python tuning/search.py",
        description,
        epilog=f"Recipes: {', '.join(RECIPES)}. Their options: python recipes/NAME.py --help",
    )
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for option in options:
            option.add_to(group, option.default)
            parser.set_defaults(**{option.name: option.default})
    _add_ranges(parser, group, argv)
    return parser


def check(args: argparse.Namespace) -> None:
    """Checks the search's own flags.

    Raises:
        RecipeError: one is out of its range, or contradicts another.
    """
    for options in OPTIONS.values():
        for option in options:
            option.check(getattr(args, option.name))
    _check_words("--clippers", args.clippers, [opts.NONE, *opts.clippers()])
    for flag, owners in _by_flag().items():
        value, name = getattr(args, flag), opts.flag_of(flag)
        if value is None:
            continue
        aliases = [alias for alias, _ in owners]
        if not set(aliases) & set(args.clippers):
            raise RecipeError(f"{name} belongs to {' or '.join(aliases)}, not among --clippers")
        if owners[0][1].kind == "word":
            _check_words(name, value, _words(owners))
        else:
            _check_range(name, *value)
    if args.learning_rate_range:
        if args.fix_learning_rate:
            raise RecipeError("--learning-rate-range and --fix-learning-rate: give one of them")
        _check_range("--learning-rate-range", *args.learning_rate_range)
    if args.points and args.tuner != "grid":
        raise RecipeError("--points needs --tuner grid")
    if args.calibration and not Path(args.calibration).is_file():
        raise RecipeError(f"--calibration {args.calibration}: no such file")


def _check_range(flag: str, low: float, high: float) -> None:
    if not 0 <= low < high < float("inf"):
        raise RecipeError(f"{flag}: must be 0 <= low < high, but is {low:g} to {high:g}")


def _check_words(flag: str, words: Sequence[str], known: Sequence[str]) -> None:
    if len(set(words)) < len(words) or not set(words) <= set(known):
        some = " ".join(words)
        raise RecipeError(f"{flag} {some}: must be some of {', '.join(known)}, each at most once")


def load_recipe(name: str) -> Any:
    """A recipe by its name, or from a file that defines RECIPE.

    Raises:
        RecipeError: no such recipe or file, or the file raises an error.
    """
    if not name.endswith(".py"):
        return find_recipe(name)
    path = Path(name)
    if "\0" in name or not path.is_file():
        raise RecipeError(f"--recipe {name}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise RecipeError(f"--recipe {name}: {type(error).__name__}: {error}") from error
    from recipes.training import Recipe

    if not hasattr(module, "RECIPE"):
        raise RecipeError(f"--recipe {name}: defines no RECIPE")
    if not isinstance(module.RECIPE, Recipe):
        raise RecipeError(f"--recipe {name}: its RECIPE is not a Recipe")
    return module.RECIPE


def recipe_options(
    args: argparse.Namespace, recipe: Any, rest: Sequence[str], flags: Sequence[str] = ()
) -> dict[str, Any]:
    """The recipe's options that a search keeps fixed, by name.

    `rest` are the arguments that the search's parser did not know, `flags` its flags, which are
    suggested for a misspelt one.

    Raises:
        RecipeError: an invalid option, or one that the search sets itself.
    """
    parsed = opts.parse(recipe, rest, flags)
    given = {**parsed.config, **parsed.given}
    for name, flag in searched_options().items():
        if name in parsed.given:
            raise RecipeError(f"--{name.replace('_', '-')} is searched here: use {flag}")
        given.pop(name, None)
    small = SMALL if args.budget == "small" else {}
    quiet: dict[str, Any] = {"tensorboard": False, "verbose": "quiet"}
    if args.tuner == "hyperband":
        quiet["keep_backup"] = True  # its next round resumes from there
    given = {**small, **quiet, **given}
    options = recipe.options(**given)
    if options.strategy == "multiworker":
        raise RecipeError("--strategy multiworker: a trial runs on one machine; see --workers")
    rates(args, options.learning_rate)  # checks that the range has it
    return given


def searched_options() -> dict[str, str]:
    """The options of a recipe that a search sets itself, and what to use instead."""
    result = dict(_SEARCHED)
    for flag, owners in _by_flag().items():
        result |= {parameter.flag: opts.flag_of(flag) for _, parameter in owners}
    return result


# --------------------------------------------------------------------------------- the search space


def _by_flag() -> dict[str, Owners]:
    """For each flag (named as in the namespace), its clippers and their parameters."""
    result: dict[str, Owners] = {}
    for alias, declaration in opts.clippers().items():
        for p in declaration.parameters:
            flag = f"{p.flag}s" if p.kind == "word" else f"{p.flag}_range"
            result.setdefault(flag, []).append((alias, p))
    return result


def _add_ranges(parser: Parser, group: argparse._ArgumentGroup, argv: Sequence[str]) -> None:
    """Adds the clippers, the learning rates, and the ranges; clippers may share a flag."""
    usual = ["absolute", "exponential", "norm"]
    known, default = ", ".join(opts.clippers()), " ".join(usual)
    text = f"from {known}; none is always included (default: {default})"
    early = Parser("", add_help=False)
    for place in (early, group):
        place.add_argument("--clippers", nargs="+", metavar="NAME", default=usual, help=text)
    chosen = early.parse_known_args(argv)[0].clippers
    group.add_argument(
        "--learning-rate-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="log (default: a third to three times the recipe's)",
    )
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


def _words(owners: Owners) -> list[str]:
    return list(dict.fromkeys(word or opts.NONE for _, p in owners for word in p.choices))


def _help(owners: Owners) -> str:
    first = owners[0][1]
    text = f"{', '.join(alias for alias, _ in owners)}: {first.help}"
    if first.kind == "word":
        words = " ".join(_words(owners))
        return f"{text}; from {words} (default: {first.default or opts.NONE})"
    suggested = "; ".join(
        f"{a} {p.range[0]:g} {p.range[1]:g}" for a, p in owners if p.threshold and p.range
    )
    scale = "log" if first.log else "linear"
    return f"{text}, {scale} (default: {suggested or 'not searched'})"


def search_space(args: argparse.Namespace, recipe: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `clip_hyperparameters`; `given` are the recipe options that the user set.

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
        **{
            f"{alias}/{parameter.name}": value
            for flag, owners in _by_flag().items()
            if (value := getattr(args, flag)) is not None
            for alias, parameter in owners
            if alias in clippers
        },
        "activation_gate": args.search_gate,
        "points": (args.points or 4) if args.tuner == "grid" else None,
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
