"""The flags of the search, their checks, and the search space; no TensorFlow is needed.

The flags of the search space are made from the clippers' declarations.
"""

import argparse
import importlib.util
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.command_line import Parser
from recipes.errors import RecipeError
from recipes.plugin import declarations
from recipes.registry import RECIPES, find_recipe
from recipes.training import options as opts
from recipes.training.folder import folder_named

Owners = list[tuple[str, declarations.Parameter]]

TUNERS = ("random", "bayesian", "hyperband", "grid")
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


def build_parser(description: str, argv: Sequence[str] = ()) -> Parser:
    """The parser of the search's own flags; all others are left to the recipe."""
    parser = Parser(
        "python tuning/search.py",
        description,
        epilog=f"Recipes: {', '.join(RECIPES)}. Their options: python recipes/NAME.py --help",
    )
    add = parser.add_argument_group("search").add_argument
    add("--recipe", default="alexnet", help="name, or a file that defines RECIPE (%(default)s)")
    add("--tuner", choices=TUNERS, default="random", help="(%(default)s)")
    add("--max-trials", type=int, metavar="N", help="baseline included (10; a grid: all)")
    add("--objective", metavar="METRIC", help="any logged metric (the recipe's: val_accuracy ...)")
    add("--direction", choices=("max", "min"), help="if the objective's name does not imply it")
    add(
        "--budget",
        choices=("small", "full"),
        default="small",
        help="small: 2 epochs of 100 steps unless given; full: the recipe's own (%(default)s)",
    )
    add("--executions", type=int, default=1, metavar="N", help="runs of each trial (%(default)s)")
    add(
        "--confirm-runs",
        type=int,
        default=5,
        metavar="N",
        help="at the end, the best clipped and unclipped trial with N other seeds: "
        "4 or more test whether clipping matters (%(default)s)",
    )
    add("--output", metavar="DIR", help="folder of the search (runs/search-RECIPE)")
    add("--keep-weights", action="store_true", help="keep best.keras of each run")
    add("--workers", type=int, default=0, metavar="N", help="processes on this machine")
    add(
        "--worker-timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="after which the trial of a silent worker goes to another (%(default)s)",
    )
    add("--traceback", action="store_true", help="errors with their traceback")
    _add_space(parser, argv)
    return parser


def check(args: argparse.Namespace) -> None:
    """Checks the search's own flags.

    Raises:
        RecipeError: one is out of its range, or contradicts another.
    """
    _check_space(args)
    for name, least in (("workers", 0), ("executions", 1), ("confirm_runs", 0)):
        if getattr(args, name) < least:
            flag = f"--{name.replace('_', '-')}"
            raise RecipeError(f"{flag} {getattr(args, name)}: must be {least} or more")
    if not 0 < args.worker_timeout < math.inf:
        raise RecipeError(
            f"--worker-timeout {args.worker_timeout:g}: must be a finite number above 0"
        )
    if args.max_trials is not None and args.max_trials < 2:
        raise RecipeError(
            f"--max-trials {args.max_trials}: at least 2, one of which is the baseline"
        )


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

    Args:
        args: the search's own flags, parsed.
        recipe: `Recipe`.
        rest: the arguments that are not flags of the search.
        flags: the search's own flags, to suggest one for a misspelt flag.

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
    rates(args, recipe.options(**given).learning_rate)  # checks that the range has it
    return given


def folder_of(args: argparse.Namespace, recipe: Any) -> Path:
    """The folder of the search, which may not exist yet.

    Raises:
        RecipeError: the name is not valid for a folder.
    """
    output = args.output
    if output is None:
        output = str(Path("runs") / f"search-{recipe.name}")
        if recipe.name != Path(recipe.name).name:
            raise RecipeError(f"--output {output!r}: no folder can have this name")
    return folder_named(output)


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


def _add_space(parser: argparse.ArgumentParser, argv: Sequence[str] = ()) -> None:
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


def _check_space(args: argparse.Namespace) -> None:
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
    return {
        f"{alias}/{parameter.name}": value
        for flag, owners in _by_flag().items()
        if (value := getattr(args, flag)) is not None
        for alias, parameter in owners
        if alias in clippers
    }


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
