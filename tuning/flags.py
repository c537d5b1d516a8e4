"""The flags of the search and their checks, before TensorFlow is needed."""

import argparse
import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.command_line import Parser
from recipes.errors import RecipeError
from recipes.registry import RECIPES, find_recipe
from recipes.training.folder import folder_named
from tuning.space_flags import add_flags, check_flags, rates, replacements

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
    add_flags(parser, argv)
    return parser


def check(args: argparse.Namespace) -> None:
    """Checks the search's own flags.

    Raises:
        RecipeError: one is out of its range, or contradicts another.
    """
    check_flags(args)
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
    from recipes.training import options as opts

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
    return {**_SEARCHED, **dict(replacements())}
