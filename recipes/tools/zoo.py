"""Trains every recipe on its embedded data and prints one table.

    python recipes/tools/zoo.py
    python recipes/tools/zoo.py --only alexnet,resnet50 --epochs 2

Options that it does not know go to every recipe. Results go to `runs/zoo` (or `--output`):
`zoo.csv` and a folder a recipe. A recipe that fails is reported in the table, the others go on, and
the exit status is 1. `--resume` keeps the finished rows of an earlier call, and goes on in the
middle of the recipe that was interrupted.
"""

import argparse
import csv
import dataclasses
import importlib
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

if not __package__:  # run as a script: the folder above recipes/ holds its packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.errors import RecipeError
from recipes.training import options as opts

# Recipe: the module and the name in it.
RECIPES = {
    "alexnet": ("recipes.alexnet", "RECIPE"),
    "vgg16": ("recipes.vgg16", "RECIPE"),
    "vgg19": ("recipes.vgg19", "RECIPE"),
    "googlenet": ("recipes.googlenet", "RECIPE"),
    "inception_v2": ("recipes.inception_v2", "RECIPE"),
    "resnet50": ("recipes.resnet50", "RECIPE"),
    "driving_resnet50": ("recipes.driving_resnet50", "RECIPE"),
    "driving_pilotnet": ("recipes.driving_pilotnet", "RECIPE"),
    "driving_resnet50_signs": ("recipes.driving_resnet50", "SIGNS"),
}
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


def find_recipe(name: str):
    """The `Recipe` of a name in `RECIPES`.

    Raises:
        RecipeError: no such recipe.
    """
    if name not in RECIPES:
        raise RecipeError(f"{name!r} is not a recipe: choose from {', '.join(RECIPES)}")
    module, attribute = RECIPES[name]
    return getattr(importlib.import_module(module), attribute)


def train(name: str, folder: str, argv: list[str]) -> dict:
    """Runs one recipe; a row of `zoo.csv`. Errors of the recipe end up in its last column."""
    from recipes.training import run

    row = dict.fromkeys(COLUMNS, "") | {"recipe": name}
    try:
        recipe = find_recipe(name)
        resume = (Path(folder) / "config.json").exists()
        options = dataclasses.replace(opts.parse(recipe, argv).options, resume=resume)
        result = run(recipe, options, folder)
    # One recipe's failure, whatever it is, must not cost the others their turn.
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        return row | {"error": f"{type(error).__name__}: {first}"}
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


def train_apart(name: str, folder: str, argv: list[str]) -> dict:
    """`train` in a process of its own, so that no recipe can take the others down with it."""
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(train, name, folder, argv).result()
    except BrokenProcessPool:
        row = dict.fromkeys(COLUMNS, "")
        return row | {"recipe": name, "error": "the process was killed (out of memory?)"}


def read(path: Path) -> dict[str, dict]:
    """The rows of a `zoo.csv` that hold a result, by recipe."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row["recipe"]: row for row in csv.DictReader(file) if not row["error"]}


def write(path: Path, rows: list[dict], columns=COLUMNS) -> None:
    """Writes a CSV file; never leaves half of one."""

    def save(scratch):
        with open(scratch, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    opts.replace_file(path, save)


def show(rows: list[dict]) -> None:
    """The table on the terminal."""
    from rich.console import Console
    from rich.table import Table

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


def _score(row: dict, key: str) -> str:
    if row[key] == "":
        return ""
    metric = row["monitor"].removeprefix("val_")
    if metric == "accuracy":
        return f"{100 * float(row[key]):.2f} %"
    return f"{metric} {float(row[key]):.4f}"


def main(argv=None) -> int:
    """The exit status: 0; 1 when a recipe failed; 2 for a mistake in the flags; 130 by Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="zoo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--only", default=",".join(RECIPES), help="recipes, comma between them")
    parser.add_argument("--output", default="runs/zoo", help="folder (default: runs/zoo)")
    parser.add_argument("--resume", action="store_true", help="keep what is finished there")
    arguments, rest = parser.parse_known_args(argv)
    output = Path(arguments.output)
    try:
        names = [name.strip() for name in arguments.only.split(",") if name.strip()]
        for name in names:
            opts.parse(find_recipe(name), rest)  # a misspelt flag must not fail each in turn
        if output.exists() and any(output.iterdir()) and not arguments.resume:
            raise RecipeError(
                f"--output {output} is not empty: name another folder, or keep what is finished "
                "there with --resume"
            )
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    output.mkdir(parents=True, exist_ok=True)
    path = output / "zoo.csv"
    done, rows = read(path), []
    for name in names:
        if name not in done:
            print(f"== {name}", flush=True)
            try:
                done[name] = train_apart(name, str(output / name), rest)
            except KeyboardInterrupt:
                print("interrupted; go on with the same command and --resume", file=sys.stderr)
                return 130
            if done[name]["error"]:
                print(f"{name} failed: {done[name]['error']}", file=sys.stderr)
        rows = [row for row in done.values() if row["recipe"] in RECIPES]
        write(path, rows)
    rows = [done[name] for name in names]
    show(rows)
    print(f"results in {path}")
    return 1 if any(row["error"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
