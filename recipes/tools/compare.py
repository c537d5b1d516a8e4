"""Trains a recipe with and without clipping, over learning rates and seeds.

    python recipes/tools/compare.py alexnet
    python recipes/tools/compare.py alexnet --learning-rates 0.01 0.03 0.1 --seeds 0 1 --epochs 3
    python recipes/tools/compare.py vgg16 --clippers recipe none norm:max_norm=5 --optimizer sgd

Other options are passed to the recipe, the same for all runs. A clipper is `recipe` (the recipe's
own), `none`, or a registered clipper with its parameters: `absolute:threshold=0.05`,
`exponential:beta=0.7,gamma=0.1`, `percentile:percentile=90,window=50,scope=layer`. Custom clippers
come from `--import MODULE`.

Writes `compare.csv` (one row per run), `compare.png` and a table into `runs/compare-RECIPE` (or
`--output`). The same command resumes an interrupted comparison. A run is `diverged` if its loss or
weights became NaN or infinite, `at chance` if its best validation accuracy was about that of
guessing, else `learned`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from recipes.command_line import Parser, exit_status
    from recipes.errors import RecipeError, TrainingDiverged
    from recipes.plugin import files
    from recipes.registry import RECIPES, find_recipe
    from recipes.tools import study
    from recipes.training import Recipe
    from recipes.training import options as opts
    from recipes.training.folder import BACKUP, BEST, CONFIG, HISTORY, differences, folder_named
    from recipes.training.recipe import at_chance
    from recipes.words import show_table
except ModuleNotFoundError as error:
    sys.exit(f"error: no module {error.name}: run `make venv`, then .venv/bin/python (README.md)")

if TYPE_CHECKING:
    import pandas as pd

KEY = ("recipe", "clipper", "learning_rate", "seed")
RESULTS = (
    *("status", "val_accuracy", "test_accuracy", "clip_fraction"),
    *("epochs", "diverged_step", "seconds"),
)
_NUMBERS = ("learning_rate", "seed", "val_accuracy", "clip_fraction")
_OF_HISTORY = ("epoch", "val_accuracy", "clip_fraction")
OWN = "recipe"


def clipper_values(recipe: Recipe, text: str) -> Mapping[str, Any]:
    """The options of one value of `--clippers`.

    `"norm:max_norm=5,scope=global"` gives `{"clipper": "norm", "max_norm": 5.0, "scope":
    "global"}`, `"recipe"` gives `{}`.

    Raises:
        RecipeError: an unknown clipper or parameter, or an invalid value.
    """
    if text == OWN:
        return {}
    name, _, tail = text.partition(":")
    flags = {
        p.name: flag for flag, p in opts.clipper_flags(recipe.extra_options).get(name, {}).items()
    }
    words = ["--clipper", name]
    for part in filter(None, tail.split(",")):
        key, _, value = part.partition("=")
        words += [opts.flag_of(flags.get(key, key)), value]
    try:
        return opts.parse(recipe, words).given
    except RecipeError as error:
        raise RecipeError(f"--clippers {text}: {error}") from None


def folder_of(output: Path, row: study.Row) -> Path:
    """The folder of a run in that of the comparison."""
    name = f"{row['clipper']}-lr{row['learning_rate']:g}-seed{row['seed']}"
    return output / "".join(c if c.isalnum() or c in "-.=" else "_" for c in name)


def run_cell(
    recipe: Recipe, values: Mapping[str, Any], folder: Path, others: float | None = None
) -> dict[str, Any]:
    """Trains one run and returns its results; resumes an interrupted run in `folder`."""
    import pandas as pd

    from recipes.training import run

    resume = (folder / CONFIG).exists()
    options = dataclasses.replace(recipe.options(**values), resume=resume)
    try:
        result = run(recipe, options, folder, study.first_steps(others))
    except TrainingDiverged as error:
        rows = pd.DataFrame(files.read_csv(folder / HISTORY), columns=_OF_HISTORY)
        return {
            "status": "diverged",
            "val_accuracy": rows["val_accuracy"].max(),
            "clip_fraction": rows["clip_fraction"].mean(),
            "epochs": len(rows),
            "diverged_step": error.step,
        }
    assert result is not None  # None only on a worker
    guess = 1 / result.data.num_outputs
    return {
        "status": "at chance" if at_chance(result.best, guess) else "learned",
        "val_accuracy": result.best,
        "test_accuracy": result.test.get("accuracy", ""),
        "clip_fraction": result.clip_fraction,
        "epochs": len(result.history),
        "seconds": round(result.seconds, 1),
    }


def outcome(row: study.Row) -> str:
    """The text about a run in the log."""
    best = row["val_accuracy"]
    return row["status"] + ("" if math.isnan(best) else f", {100 * best:.1f} %")


def scored(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with the figures of table and picture, in %; NaN for a diverged run."""
    kept = rows["val_accuracy"].where(rows["status"] != "diverged")
    return rows.assign(score=100 * kept, clipped=100 * rows["clip_fraction"])


def cell_text(runs: pd.DataFrame) -> str:
    """A cell of the table: the accuracy, and the clipped share if there is a clipper."""
    share = runs["clipped"].mean()  # NaN if all diverged in their first epoch
    of_clipper = runs["clipper"].iloc[0] != "none" and not math.isnan(share)
    return study.summary(runs) + (f"; {share:.3g} % clipped" if of_clipper else "")


def draw(rows: pd.DataFrame, path: Path, title: str) -> None:
    """Draws accuracy and clip fraction over the learning rate."""
    rows = scored(rows)
    rows["clipped"] = rows["clipped"].where(rows["clipper"] != "none")
    measures = {"score": "best validation accuracy, %", "clipped": "clipped, % (mean of epochs)"}
    study.draw(path, rows, title, measures)


def compare(
    recipe: Recipe,
    rest: Sequence[str],
    clippers: Sequence[str],
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    output: Path,
) -> pd.DataFrame:
    """Runs the cells that have no row in `output`; returns all rows.

    `rest` are options for every run, as on the recipe's command line.

    Raises:
        RecipeError: invalid options, or different ones than in `output`.
    """
    if recipe.monitor != "val_accuracy":
        raise RecipeError(f"{recipe.name} is not a classifier: there is no accuracy to compare")
    parsed = opts.parse(recipe, rest)
    shared = {**parsed.config, "tensorboard": False, "verbose": "quiet", **parsed.given}
    if recipe.options(**shared).strategy == "multiworker":
        raise RecipeError("--strategy multiworker: a comparison runs on one machine")
    varied = ("learning_rate", "seed")
    for flag in (opts.flag_of(name) for name in varied if name in parsed.given):
        raise RecipeError(f"{flag}: differs from run to run here: use {flag}s")
    clipping = opts.clipping_names(recipe.extra_options)
    for flag in (opts.flag_of(name) for name in clipping if name in parsed.given):
        if OWN not in clippers:
            raise RecipeError(f"{flag}: changes {OWN!r}, which is not among --clippers")
    cells = []
    for rate, seed, clipper in itertools.product(learning_rates, seeds, clippers):
        chosen = clipper_values(recipe, clipper)
        values = {n: v for n, v in shared.items() if not chosen or n not in clipping}
        values |= {**chosen, "learning_rate": rate, "seed": seed}
        recipe.options(**values)  # check every cell before the first run
        key = {"recipe": recipe.name, "clipper": clipper, "learning_rate": rate, "seed": seed}
        job = functools.partial(run_cell, recipe, values, folder_of(output, key))
        cells.append(study.Cell(key, f"{clipper} at {rate:g}, seed {seed}", job))
    output.mkdir(parents=True, exist_ok=True)
    # Options of all cells: rows with different ones must not share a table.
    common = {n: v for n, v in recipe.options(**shared).saved.items() if n not in varied}
    settings = output / "compare.json"
    if settings.exists():
        before = opts.read_config(settings, recipe)
        before, now = (opts.with_defaults(recipe, values) for values in (before, common))
        if changed := differences(before, now):
            raise RecipeError(
                f"{output} was begun with other options: name another --output ({changed})"
            )
    table = study.StudyFile(output / "compare.csv", KEY, RESULTS, _NUMBERS)
    table.read()  # detects damage before anything is written
    files.write_json(settings, common)

    def picture() -> None:
        draw(table.read(), output / "compare.png", f"{recipe.name}: with and without clipping")

    def after(row: study.Row) -> None:
        # Hundreds of megabytes a cell; not before it has its row, or a kill would leave neither.
        for name in (BACKUP, BEST):
            (folder_of(output, row) / name).unlink(missing_ok=True)
        picture()

    rows = table.run(cells, outcome, after=after)
    picture()
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the status of `recipes.command_line.exit_status`."""
    program = "python recipes/tools/compare.py"
    parser = Parser(program, __doc__, usage=f"{program} RECIPE [--FLAG VALUE ...]")
    parser.add_argument("recipe", choices=list(RECIPES))
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--clippers", nargs="+", default=[OWN, "none"])
    parser.add_argument("--output", help="folder (default: runs/compare-RECIPE)")

    def work() -> None:
        given, rest = parser.parse_known_args(argv)
        recipe = find_recipe(given.recipe)
        opts.parse(recipe, rest, parser.flags)  # suggests one of them for a misspelt flag
        usual = f"runs/compare-{given.recipe}"
        output = folder_named(usual if given.output is None else given.output)
        rows = compare(recipe, rest, given.clippers, given.learning_rates, given.seeds, output)
        seeds = ", ".join(map(str, given.seeds))
        table = study.cross_table(scored(rows), "learning_rate", "clipper", cell_text)
        show_table(
            table.rename(columns={"learning_rate": "learning rate"}),
            f"{given.recipe}: best validation accuracy in %, mean (lowest–highest); seeds: {seeds}",
        )
        print(f"results in {output / 'compare.csv'} and {output / 'compare.png'}")

    return exit_status(work, interrupted="; the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
