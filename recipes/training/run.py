"""The command line of a recipe, and the same run from Python."""

import contextlib
import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes import STARTED
from recipes.command_line import exit_status, import_tensorflow
from recipes.errors import TrainingDiverged
from recipes.training import folder as folders
from recipes.training import multiworker
from recipes.training import options as opts
from recipes.training.options import Options
from recipes.training.recipe import Recipe, Result


def main(recipe: Recipe, argv: Sequence[str] | None = None) -> int:
    """Runs a recipe from the command line.

    Returns:
        The exit status, as `recipes.command_line.exit_status` says.
    """
    started = STARTED if argv is None else None
    argv = sys.argv[1:] if argv is None else list(argv)
    folder: Path | None = None

    def work() -> None:
        nonlocal folder
        options, folder = folders.open_run(recipe, opts.parse(recipe, argv))
        try:
            result = run(recipe, options, folder, started=started)
        except TrainingDiverged as error:
            best = folder / folders.BEST
            left = f"; the last good model is in {best}" if best.exists() else ""
            raise TrainingDiverged(f"{error}{left}", error.step, error.layer) from error
        if result is not None:
            print_result(recipe, result)

    def how_to_resume() -> str:
        with contextlib.suppress(OSError):
            if folder is not None and (folder / folders.BACKUP).exists():
                where = shlex.quote(str(folder))
                return f"; go on with: {_command()} --resume --output {where}"
        return ""

    return exit_status(work, argv, interrupted=how_to_resume, hint=how_to_resume)


def _command() -> str:
    """How this program was started, without its options."""
    program = sys.argv[0]
    return f"python {shlex.quote(program)}" if program.endswith(".py") else "the same command"


def run(
    recipe: Recipe,
    options: Options,
    folder: str | os.PathLike[str],
    callbacks: Sequence[Any] = (),
    started: float | None = None,
) -> Result | None:
    """Trains, and writes everything into `folder`.

    With `--strategy multiworker` every worker calls this. The chief writes and returns a `Result`,
    the others return None; all see `folder` where a run is resumed.

    Args:
        recipe: `Recipe`.
        options: from `recipe.options(...)`.
        folder: of the results, for this run alone; with `options.resume` the run in it goes on.
        callbacks: more Keras callbacks, run after the recipe's own.
        started: `time.monotonic()` at which the run's time begins; None for now.

    Raises:
        RecipeError: a clipper, data set or device that cannot be, or a folder that is in use.
        TrainingDiverged: NaN; names the variable of the first gradient that was not finite.
        WorkerLost: another worker died or hangs.
        OSError: a full disk, a folder that cannot be written.
    """
    folder, started = Path(folder), time.monotonic() if started is None else started
    writes = options.strategy != "multiworker" or multiworker.read_cluster().is_chief
    with folders.claimed(folder, options.resume) if writes else contextlib.nullcontext():
        import_tensorflow()  # which flags need not wait for
        from recipes.training import trainer

        return trainer.train(recipe, options, folder, callbacks=callbacks, started=started)


def print_result(recipe: Recipe, result: Result) -> None:
    """The closing tables and the two last lines that scripts read."""
    from rich.console import Console
    from rich.table import Table

    from recipes.training import evaluation  # imports TensorFlow

    table = Table(title=f"{recipe.name} on {result.data.name}", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for row in _rows(recipe, result):
        table.add_row(*row)
    evaluation.print_classes(result.output)
    Console().print(table)
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
    last = result.history[-1] if result.history else {}
    if "grad_norm" in last:
        rows.append(("gradient norm, last epoch", f"{last['grad_norm']:.4g}"))
    skipped = sum(int(row.get("skipped") or 0) for row in result.history)
    if skipped:
        rows.append(("skipped updates", f"{skipped} (gradients that were not finite)"))
    rows.append(("results in", str(result.output)))
    if not result.kept:
        rows.append(("note", "no epoch met the rule --select-best: no best.keras"))
    return rows
