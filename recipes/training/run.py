"""The command line of a recipe, and the tables at its end."""

import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from recipes import STARTED
from recipes.command_line import exit_status
from recipes.errors import RecipeError, TrainingDiverged
from recipes.training import folder as folders
from recipes.training import options as opts
from recipes.training.recipe import Recipe, Result
from recipes.training.trainer import run


def main(recipe: Recipe, argv: Sequence[str] | None = None) -> int:
    """Runs a recipe from the command line.

    Returns:
        The exit status, as `recipes.command_line.exit_status` says.
    """
    started = STARTED if argv is None else None
    argv = sys.argv[1:] if argv is None else list(argv)

    def work() -> None:
        options, folder = folders.open_run(recipe, opts.parse(recipe, argv))
        try:
            result = run(recipe, options, folder, started=started)
        except BaseException as error:
            _add_advice(error, folder)
            raise
        if result is not None:
            print_result(recipe, result)

    return exit_status(work, argv)


def _add_advice(error: BaseException, folder: Path) -> None:
    """Adds to the error of a run what its folder holds, or the command that resumes it."""
    if isinstance(error, TrainingDiverged) and (folder / folders.BEST).exists():
        error.add_note(f"the last good model is in {folder / folders.BEST}")
    elif not isinstance(error, RecipeError) and (folder / folders.BACKUP).exists():
        script = sys.argv[0]
        command = f"python {shlex.quote(script)}" if script.endswith(".py") else "the same command"
        error.add_note(f"go on with: {command} --resume --output {shlex.quote(str(folder))}")


def print_result(recipe: Recipe, result: Result) -> None:
    """The closing tables and the two last lines that scripts read."""
    from rich.console import Console
    from rich.table import Table

    from recipes.training import evaluation  # imports TensorFlow

    table = Table(title=f"{recipe.name} on {result.data.name}", show_header=False)
    table.add_column(style="bold", overflow="fold")
    table.add_column(overflow="fold")
    for row in _rows(recipe, result):
        table.add_row(*row)
    evaluation.print_classes(result.output)
    Console(markup=False).print(table)
    if recipe.monitor == "val_accuracy":
        print(f"Best accuracy: {100 * result.best:.2f}%")
    print(f"Time taken: {result.seconds:.0f} seconds")


def _rows(recipe: Recipe, result: Result) -> Sequence[tuple[str, str]]:
    rows = [("parameters", f"{result.parameters:,}"), ("epochs", str(len(result.history)))]
    if recipe.monitor == "val_accuracy":
        epoch = result.best_epoch + 1
        rows.append(("best validation accuracy", f"{100 * result.best:.2f} % (epoch {epoch})"))
        if "accuracy" in result.test:
            chosen = "test_accuracy" in result.history[-1]  # --select-best beats-test looks at it
            note = " (the epoch was chosen by it, too)" if chosen else ""
            rows.append(("its test accuracy", f"{100 * result.test['accuracy']:.2f} %{note}"))
    if recipe.report:
        rows += recipe.report(result)
    if not math.isnan(result.clip_fraction):
        rows.append(("clipped", f"{100 * result.clip_fraction:.3g} % (mean over the epochs)"))
    norm = result.history[-1].get("grad_norm", math.nan)
    if not math.isnan(norm):  # of an epoch without an update
        rows.append(("gradient norm, last epoch", f"{norm:.4g}"))
    skipped = sum(int(row.get("skipped", 0)) for row in result.history)
    if skipped:
        rows.append(("skipped updates", f"{skipped} (gradients that were not finite)"))
    rows.append(("results in", str(result.output)))
    if not result.kept:
        rows.append(("note", "no epoch met the rule --select-best: no best.keras"))
    return rows
