"""Trains every recipe on its embedded data and prints one table.

    python recipes/tools/zoo.py
    python recipes/tools/zoo.py --only alexnet,resnet50 --epochs 2

Options that it does not know go to every recipe. Results go to `runs/zoo` (or `--output`):
`zoo.csv` and a folder a recipe. A recipe that fails is reported in the table, the others go on, and
the exit status is 1. `--resume` keeps the finished rows of an earlier call, and goes on in the
middle of the recipe that was interrupted.
"""

import argparse
import dataclasses
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the folder above recipes/ holds its packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import recipes.tools  # noqa: F401  (changes to the environment that has what follows)

from rich.console import Console
from rich.table import Table

from keras_gradclip.files import read_csv, write_csv
from recipes.command_line import Parser, exit_status
from recipes.errors import RecipeError, first_line, plain_errors
from recipes.registry import RECIPES, find_recipe
from recipes.training import options as opts
from recipes.training import run
from recipes.training.folder import folder_named

Row = dict[str, Any]
COLUMNS = (
    "recipe",
    "parameters",
    "monitor",
    "best",
    "best_epoch",
    "test",
    "clip_fraction",
    "seconds",
    "error",
)

_NUMBERS = ("parameters", "best", "clip_fraction", "seconds")  # of a row that is finished


def train(name: str, folder: str, argv: list[str]) -> Row:
    """Runs one recipe; a row of `zoo.csv`. Errors of the recipe end up in its last column."""
    row: Row = dict.fromkeys(COLUMNS, "") | {"recipe": name}
    try:
        recipe = find_recipe(name)
        resume = (Path(folder) / "config.json").exists()
        options = dataclasses.replace(opts.parse(recipe, argv).options, resume=resume)
        result = run(recipe, options, folder)
    # One recipe's failure, whatever it is, must not cost the others their turn.
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {first_line(error)}"}
    if result is None:
        return row | {"error": "--strategy multiworker: a zoo runs on one machine"}
    metric = result.monitor.removeprefix("val_")
    return row | {
        "parameters": result.parameters,
        "monitor": result.monitor,
        "best": result.best,
        "best_epoch": result.best_epoch + 1,
        "test": result.test.get(metric, ""),
        "clip_fraction": result.clip_fraction,
        "seconds": round(result.seconds, 1),
    }


def train_apart(name: str, folder: str, argv: list[str]) -> Row:
    """`train` in a process of its own, so that no recipe can take the others down with it."""
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(train, name, folder, argv).result()
    except BrokenProcessPool:
        return dict.fromkeys(COLUMNS, "") | {
            "recipe": name,
            "error": "the process was killed (out of memory?)",
        }


def finished_rows(path: Path) -> dict[str, Row]:
    """The rows of a `zoo.csv` that hold a result, by recipe."""
    with plain_errors():
        rows = read_csv(path)
    if rows and not rows[0].keys() >= set(COLUMNS):
        raise RecipeError(f"{path}: is not a table of the zoo: name another --output")
    whole = [row for row in rows if all(isinstance(row[name], float) for name in _NUMBERS)]
    return {row["recipe"]: row for row in whole if not row["error"]}


def show(rows: Sequence[Row]) -> None:
    """The table on the terminal."""
    table = Table(title="the zoo on embedded data")
    table.add_column("network")
    for column in ("parameters", "validation", "test", "clipped", "seconds"):
        table.add_column(column, justify="right")
    for row in rows:
        if row["error"]:
            table.add_row(row["recipe"], "", f"[red]failed: {row['error']}[/red]", "", "", "")
            continue
        table.add_row(
            row["recipe"],
            f"{int(row['parameters']):,}",
            _score(row, "best"),
            _score(row, "test"),
            f"{100 * float(row['clip_fraction']):.3g} %",
            f"{float(row['seconds']):.0f}",
        )
    Console().print(table)


def _score(row: Row, key: str) -> str:
    if row[key] == "":
        return ""
    metric = row["monitor"].removeprefix("val_")
    if metric == "accuracy":
        return f"{100 * float(row[key]):.2f} %"
    return f"{metric} {float(row[key]):.4f}"


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0; 1 when a recipe failed; 2 for a mistake in the flags; 130 by Ctrl-C."""
    parser = Parser(prog="zoo", description=__doc__)
    parser.add_argument("--only", default=",".join(RECIPES), help="recipes, comma between them")
    parser.add_argument("--output", default="runs/zoo", help="folder (default: runs/zoo)")
    parser.add_argument("--resume", action="store_true", help="keep what is finished there")
    return exit_status(
        lambda: train_all(*parser.parse_known_args(argv)),
        interrupted="; go on with the same command and --resume",
    )


def train_all(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Trains the recipes that have no row yet; 1 where one failed."""
    output = folder_named(arguments.output)
    names = [name.strip() for name in arguments.only.split(",") if name.strip()]
    if not names:
        raise RecipeError(f"--only {arguments.only!r}: names no recipe")
    for name in names:
        opts.parse(find_recipe(name), rest)  # a misspelt flag must not fail each in turn
    if output.exists() and any(output.iterdir()) and not arguments.resume:
        raise RecipeError(
            f"--output {output} is not empty: name another folder, or keep what is finished "
            "there with --resume"
        )
    output.mkdir(parents=True, exist_ok=True)
    path = output / "zoo.csv"
    done = finished_rows(path)
    for name in names:
        if name not in done:
            print(f"== {name}", flush=True)
            done[name] = train_apart(name, str(output / name), rest)
            if done[name]["error"]:
                print(f"{name} failed: {done[name]['error']}", file=sys.stderr)
        write_csv(path, COLUMNS, [row for row in done.values() if row["recipe"] in RECIPES])
    rows = [done[name] for name in names]
    show(rows)
    print(f"results in {path}")
    return 1 if any(row["error"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
