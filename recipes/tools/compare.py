"""Trains a recipe with and without clipping, over learning rates and seeds.

    python recipes/tools/compare.py alexnet --learning-rates 0.01 0.03 0.1 --seeds 0 1 --epochs 3
    python recipes/tools/compare.py vgg16 --clippers recipe none norm:max_norm=5 --optimizer sgd

Options that it does not know go to the recipe, for all cells alike. A clipper is `recipe` (the
recipe's own), `none`, or a registered clipper with its parameters: `absolute:threshold=0.05`,
`exponential:beta=0.7,gamma=0.1`, `percentile:percentile=90,window=50,scope=layer`. Clippers of your
own come from `--import MODULE`.

Writes `compare.csv` (a row a run), `compare.png` and a table into `runs/compare-RECIPE` (or
`--output`). The same command again goes on where it was interrupted. A run is `diverged` when its
loss or weights became NaN or infinite, `at chance` when its best validation accuracy was about that
of guessing, else `learned`.
"""

import dataclasses
import itertools
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: the folder above recipes/ holds its packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import recipes.tools  # noqa: F401  (changes to the environment that has what follows)

from keras_gradclip.files import read_csv, replace_file, write_csv, write_json
from recipes.command_line import Parser, exit_status
from recipes.errors import RecipeError, TrainingDiverged, plain_errors
from recipes.registry import RECIPES, find_recipe
from recipes.training import options as opts
from recipes.training.folder import folder_named
from recipes.training.recipe import at_chance

COLUMNS = (
    "recipe",
    "clipper",
    "learning_rate",
    "seed",
    "status",
    "val_accuracy",
    "test_accuracy",
    "clip_fraction",
    "epochs",
    "diverged_step",
    "seconds",
)
OWN = "recipe"


def clipper_values(text: str) -> dict:
    """The options that a `--clippers` word stands for.

    `"norm:max_norm=5,scope=global"` gives `{"clipper": "norm", "max_norm": 5.0, "scope":
    "global"}`, `"recipe"` gives `{}`.

    Raises:
        RecipeError: an unknown clipper or parameter, or a value that is no number.
    """
    name, _, tail = text.partition(":")
    if name == OWN and not tail:
        return {}
    known = opts.table()
    names = known["clipper"].choices
    if name not in names:
        raise RecipeError(f"--clippers {text}: must start with {OWN} or one of {', '.join(names)}")
    flags = {p.name: flag for flag, p in opts.clipper_flags().by_clipper.get(name, {}).items()}
    values: dict = {"clipper": name}
    for part in filter(None, tail.split(",")):
        key, _, value = part.partition("=")
        if key not in flags:
            allowed = ", ".join(flags) or "none"
            raise RecipeError(f"--clippers {text}: {key!r} is not a parameter of {name}: {allowed}")
        try:
            values[flags[key]] = known[flags[key]].kind(value)
        except ValueError:
            raise RecipeError(f"--clippers {text}: {key}={value!r} is not a number") from None
    return values


def run_cell(recipe, values: dict, folder: Path) -> dict:
    """One run; the part of its row that the run decides.

    An interrupted run in `folder` is resumed.
    """
    from recipes.training import run

    resume = (folder / "config.json").exists()
    options = dataclasses.replace(recipe.options(**values), resume=resume)
    started = time.monotonic()
    row: dict[str, object] = dict.fromkeys(COLUMNS, "")
    try:
        result = run(recipe, options, folder)
    except TrainingDiverged as error:
        history = read_csv(folder / "history.csv")
        best = max((r["val_accuracy"] for r in history), default=math.nan)
        row |= {"status": "diverged", "val_accuracy": best, "diverged_step": error.step}
        row |= {"clip_fraction": _mean(r["clip_fraction"] for r in history)}
        return row | {"epochs": len(history), "seconds": round(time.monotonic() - started, 1)}
    if result is None:  # a worker of a cluster, which writes nothing
        return row
    guess = 1 / result.data.num_outputs
    return row | {
        "status": "at chance" if at_chance(result.best, guess) else "learned",
        "val_accuracy": result.best,
        "test_accuracy": result.test.get("accuracy", ""),
        "clip_fraction": result.clip_fraction,
        "epochs": len(result.history),
        "seconds": round(result.seconds, 1),
    }


def _mean(values) -> float:
    values = list(values)
    return statistics.fmean(values) if values else math.nan


def read(path: Path) -> list[dict]:
    """The rows of a `compare.csv`, numbers as numbers."""
    numbers = {"learning_rate": float, "seed": int, "val_accuracy": float, "clip_fraction": float}
    with plain_errors():
        rows = read_csv(path, numbers=False, needs=COLUMNS)
    try:
        return [row | {name: kind(row[name]) for name, kind in numbers.items()} for row in rows]
    except ValueError as error:
        raise RecipeError(f"{path}: {error}; mend it, or name another --output") from None


def key(row: dict) -> tuple:
    """What tells a cell from the others."""
    return row["clipper"], float(row["learning_rate"]), int(row["seed"])


def show(rows: list[dict], title: str) -> None:
    """The table on the terminal: a line a learning rate, the clippers side by side."""
    from rich.console import Console
    from rich.table import Table

    clippers = list(dict.fromkeys(row["clipper"] for row in rows))
    table = Table(title=f"{title}: best validation accuracy, mean (lowest to highest) over seeds")
    table.add_column("learning rate", justify="right")
    for clipper in clippers:
        table.add_column(_label(clipper), justify="right")
        if clipper != "none":
            table.add_column("clipped", justify="right")
    for rate in sorted({row["learning_rate"] for row in rows}):
        cells = [f"{rate:g}"]
        for clipper in clippers:
            here = [r for r in rows if r["clipper"] == clipper and r["learning_rate"] == rate]
            cells.append(summary(here))
            if clipper != "none":
                # A run that diverged in its first epoch has no figure.
                known = [r["clip_fraction"] for r in here if not math.isnan(r["clip_fraction"])]
                fraction = _mean(known)
                cells.append("" if math.isnan(fraction) else f"{100 * fraction:.3g} %")
        table.add_row(*cells)
    Console().print(table)


def summary(rows: list[dict]) -> str:
    """`"96.1 % (95.8 to 96.4)"`, then how many of the runs diverged or stayed at chance."""
    parts = []
    scores = [100 * r["val_accuracy"] for r in rows if r["status"] != "diverged"]
    if scores:
        spread = f" ({min(scores):.1f} to {max(scores):.1f})" if len(scores) > 1 else ""
        parts.append(f"{statistics.fmean(scores):.1f} %{spread}")
    for status in ("diverged", "at chance"):
        count = sum(r["status"] == status for r in rows)
        if count:
            parts.append(f"{count} of {len(rows)} {status}")
    return ", ".join(parts)


def _label(clipper: str) -> str:
    return {"none": "no clipping", OWN: "clipped"}.get(clipper, clipper)


def draw(rows: list[dict], path: Path, title: str) -> None:
    """Accuracy and clip fraction over the learning rate; diverged runs as crosses at zero."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    accuracy, clipped = figure.subplots(1, 2)
    clippers = list(dict.fromkeys(row["clipper"] for row in rows))
    for number, clipper in enumerate(clippers):
        mine = [row for row in rows if row["clipper"] == clipper]
        style = {"color": f"C{number}"}
        rates = sorted({row["learning_rate"] for row in mine})
        # A diverged run leaves no model: it counts as zero in the mean line.
        score = {id(r): 0.0 if r["status"] == "diverged" else 100 * r["val_accuracy"] for r in mine}
        means = [_mean(score[id(r)] for r in mine if r["learning_rate"] == rate) for rate in rates]
        accuracy.plot(rates, means, label=_label(clipper), **style)
        for diverged, marker in ((False, "o"), (True, "x")):
            dots = [r for r in mine if (r["status"] == "diverged") == diverged]
            accuracy.scatter(
                [r["learning_rate"] for r in dots],
                [score[id(r)] for r in dots],
                marker=marker,
                **style,
            )
        if clipper != "none":
            dots = [r for r in mine if not math.isnan(r["clip_fraction"])]
            clipped.scatter(
                [r["learning_rate"] for r in dots],
                [100 * r["clip_fraction"] for r in dots],
                label=_label(clipper),
                **style,
            )
    accuracy.set(ylabel="best validation accuracy, %  (x: diverged)", ylim=(-4, 104))
    clipped.set(ylabel="clipped, % (mean over the epochs)", ylim=(-4, 104))
    for axis in (accuracy, clipped):
        axis.set(xscale="log", xlabel="peak learning rate")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    figure.suptitle(title)
    replace_file(path, lambda scratch: figure.savefig(scratch, dpi=110))


def compare(recipe, rest: list[str], clippers, learning_rates, seeds, output: Path) -> list[dict]:
    """Runs the cells that `output` has no row of yet; returns all rows.

    Args:
        recipe: `Recipe`, a classifier.
        rest: options for every cell, as on the recipe's command line.
        clippers: words of `--clippers`.
        learning_rates: floats.
        seeds: ints.
        output: the folder.

    Raises:
        RecipeError: wrong options, or `output` was begun with others.
    """
    if recipe.monitor != "val_accuracy":
        raise RecipeError(f"{recipe.name} is not a classifier: there is no accuracy to compare")
    parsed = opts.parse(recipe, rest)
    shared = {**parsed.config, **parsed.given, "tensorboard": False}
    shared.setdefault("verbose", "quiet")
    clipping = opts.clipping_names(recipe.extra_options)
    cells = []
    for rate, seed, clipper in itertools.product(learning_rates, seeds, clippers):
        chosen = clipper_values(clipper)
        values = {n: v for n, v in shared.items() if not chosen or n not in clipping}
        values |= {**chosen, "learning_rate": rate, "seed": seed}
        recipe.options(**values)  # every cell is checked before the first one runs
        cells.append(({"clipper": clipper, "learning_rate": rate, "seed": seed}, values))
    output.mkdir(parents=True, exist_ok=True)
    # What all cells share: rows made otherwise must not stand in one table.
    common = opts.saved_options(recipe, recipe.options(**shared))
    for name in ("learning_rate", "seed"):
        common.pop(name)
    settings = output / "compare.json"
    if settings.exists() and opts.read_json(settings) != common:
        raise RecipeError(f"{output} was begun with other options: name another --output")
    path = output / "compare.csv"
    rows = read(path)
    write_json(settings, common)
    for cell, values in cells:
        if key(cell) in {key(row) for row in rows}:
            continue
        name = f"{cell['clipper']}-lr{cell['learning_rate']:g}-seed{cell['seed']}"
        folder = output / "".join(c if c.isalnum() or c in "-.=" else "_" for c in name)
        print(f"{len(rows) + 1}: {name}", end=" ... ", flush=True)
        row = run_cell(recipe, values, folder) | {"recipe": recipe.name} | cell
        best = "" if math.isnan(row["val_accuracy"]) else f", {100 * row['val_accuracy']:.1f} %"
        print(row["status"] + best, flush=True)
        rows.append(row)
        write_csv(path, COLUMNS, rows)
        draw(rows, output / "compare.png", f"{recipe.name}: with and without clipping")
        for name in ("backup.npz", "best.keras"):  # hundreds of megabytes a cell
            (folder / name).unlink(missing_ok=True)
    wanted = {key(cell) for cell, _ in cells}
    return [row for row in rows if key(row) in wanted]


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: see `recipes.command_line.exit_status`."""
    parser = Parser(prog="compare", description=__doc__)
    parser.add_argument("recipe", choices=list(RECIPES))
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--clippers", nargs="+", default=[OWN, "none"])
    parser.add_argument("--output", help="folder (default: runs/compare-RECIPE)")

    def work() -> None:
        given, rest = parser.parse_known_args(argv)
        usual = f"runs/compare-{given.recipe}"
        output = folder_named(usual if given.output is None else given.output)
        recipe, rates = find_recipe(given.recipe), given.learning_rates
        rows = compare(recipe, rest, given.clippers, rates, given.seeds, output)
        show(rows, given.recipe)
        print(f"results in {output / 'compare.csv'} and {output / 'compare.png'}")

    return exit_status(work, interrupted="; the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
