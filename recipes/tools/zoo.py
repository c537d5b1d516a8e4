"""Trains every recipe on its embedded data and prints one table.

    python recipes/tools/zoo.py
    python recipes/tools/zoo.py --only alexnet,resnet50 --epochs 2
    python recipes/tools/zoo.py --resume

Other options are passed to every recipe, which runs in a process of its own. Results go to
`runs/zoo` (or `--output`): `zoo.csv` and a folder for each recipe. If a recipe fails, the table
says so, the others continue, and the exit status is 1. `--resume` keeps the finished rows of an
earlier call and resumes the interrupted recipe. `at chance`: the best validation accuracy is about
that of guessing.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from recipes import processes
    from recipes.command_line import Parser, exit_status
    from recipes.errors import RecipeError
    from recipes.plugin import files
    from recipes.registry import RECIPES, find_recipe
    from recipes.tools import study
    from recipes.training import options as opts
    from recipes.training.folder import CLASSES, CONFIG, RESULT, differences, folder_named
    from recipes.training.recipe import at_chance
    from recipes.words import show_table
except ModuleNotFoundError as error:
    sys.exit(f"error: no module {error.name}: run `make venv`, then .venv/bin/python (README.md)")

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]
RESULTS = (
    *("parameters", "monitor", "best", "best_epoch", "test", "clip_fraction"),
    *("seconds", "error"),
)
#: Duration of a recipe relative to ResNet-50 (recipes/README.md), of the others 0.3.
COSTS = {"vgg16": 0.8, "vgg19": 1.6, "googlenet": 0.6, "inception_v2": 0.4, "resnet50": 1.0}


def train(name: str, folder: Path, flags: Sequence[str], others: float | None = None) -> Row:
    """Trains a recipe, or resumes it, in a process of its own; returns the rest of its row.

    Of a process that failed that is "error", its last line.
    """
    del others  # the process shows its own progress
    command = [sys.executable, "-m", RECIPES[name][0], *flags, "--output", str(folder)]
    if "task" in (settings := find_recipe(name).settings):  # one of two recipes in a script
        command += ["--task", str(settings["task"])]
    if (folder / CONFIG).exists():
        command.append("--resume")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with processes.started(command, {name: environment}) as running:
        line = ""
        for raw in running[name].stdout or ():
            line = raw.decode(errors="replace").rstrip()
            print(f"  {line}", flush=True)
        code = running[name].wait()
    if code:
        return {"error": processes.ending(code) if code < 0 else line.removeprefix("error: ")}
    result = files.read_json(folder / RESULT)
    test = result["test"].get(result["monitor"].removeprefix("val_"), "")
    return {column: result[column] for column in RESULTS if column in result} | {"test": test}


def outcome(row: study.Row, output: Path) -> str:
    """The text about a run in a folder of `output`, for log and table."""
    if row["error"]:
        return f"failed: {row['error']}"
    text = score(row, "best")
    if row["monitor"] != "val_accuracy":
        return text
    try:
        classes = len(files.read_json(output / row["recipe"] / CLASSES)["classes"])
        is_guess = at_chance(float(row["best"]), 1 / classes)
    except (OSError, KeyError, TypeError, ValueError, ZeroDivisionError):
        return text  # a run of an earlier version, or of data without names of classes
    return f"{text}, at chance" if is_guess else text


def score(row: study.Row, column: str) -> str:
    """The value of a column in the recipe's own metric."""
    metric = row["monitor"].removeprefix("val_")
    if row[column] == "":
        return ""
    value = float(row[column])
    return f"{100 * value:.2f} %" if metric == "accuracy" else f"{metric} {value:.4f}"


def table(rows: pd.DataFrame, output: Path) -> pd.DataFrame:
    """The printed table: one line per recipe, whose run is in a folder of `output`."""
    import pandas as pd

    columns = ("network", "parameters", "validation", "test", "clipped", "seconds")
    lines = []
    for row in rows.to_dict("records"):
        line = dict.fromkeys(columns, "")
        line |= {"network": row["recipe"], "validation": outcome(row, output)}
        if not row["error"]:
            line |= {
                "parameters": f"{int(float(row['parameters'])):,}",
                "test": score(row, "test"),
                "clipped": f"{100 * float(row['clip_fraction'] or 'nan'):.3g} %",
                "seconds": f"{float(row['seconds']):.0f}",
            }
        lines.append(line)
    return pd.DataFrame(lines)


def train_all(arguments: argparse.Namespace, rest: list[str], flags: list[str]) -> int:
    """Trains the recipes without a row; returns 1 if one failed."""
    output = folder_named(arguments.output)
    names = [name.strip() for name in arguments.only.split(",") if name.strip()]
    if not names:
        raise RecipeError(f"--only {arguments.only!r}: names no recipe")
    for name in names:  # report a misspelt flag once
        recipe = find_recipe(name)
        options = opts.parse(recipe, rest, flags).options
        if options.strategy == "multiworker":
            raise RecipeError("--strategy multiworker: a zoo runs on one machine")
        if arguments.resume and (path := output / name / CONFIG).exists():
            saved = (opts.read_config(path, recipe), options.saved)
            if changed := differences(*(opts.with_defaults(recipe, values) for values in saved)):
                raise RecipeError(
                    f"--resume: {path.parent} was trained with other values: {changed}"
                )
    if output.exists() and any(output.iterdir()) and not arguments.resume:
        raise RecipeError(
            f"--output {output} is not empty: name another folder, or keep what is finished "
            "there with --resume"
        )
    output.mkdir(parents=True, exist_ok=True)
    zoo = study.StudyFile(output / "zoo.csv", ("recipe",), RESULTS)
    zoo.drop(zoo.read()["error"] != "")
    cells = []
    for name in names:
        job = functools.partial(train, name, output / name, rest)
        cells.append(study.Cell({"recipe": name}, name, job, COSTS.get(name, 0.3)))
    rows = zoo.run(cells, functools.partial(outcome, output=output))
    show_table(table(rows, output), "the zoo on embedded data")
    print(f"results in {zoo.path}")
    return 1 if rows["error"].any() else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Exit status: 0; 1 if a recipe failed; 2: invalid flag; 130: Ctrl-C."""
    parser = Parser("python recipes/tools/zoo.py", __doc__)
    parser.add_argument("--only", default=",".join(RECIPES), help="recipes, comma between them")
    parser.add_argument("--output", default="runs/zoo", help="folder (default: runs/zoo)")
    parser.add_argument("--resume", action="store_true", help="keep what is finished there")
    return exit_status(
        lambda: train_all(*parser.parse_known_args(argv), parser.flags),
        interrupted="; go on with the same command and --resume",
    )


if __name__ == "__main__":
    sys.exit(main())
