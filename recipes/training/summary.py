"""What does a run say about itself? At its start what it does where, at its end what came out."""

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from recipes.training import build, devices
from recipes.training.option_table import Options
from recipes.training.recipe import Recipe, Result
from recipes.words import counted

if TYPE_CHECKING:
    from recipes.training.session import Session


def opening_lines(run: "Session", start: int) -> list[str]:
    """A few lines: folder, network, clipper, data, devices, precision, what is resumed.

    Args:
        run: that begins.
        start: int, steps that are done already.
    """
    options, data, clipper, steps = run.options, run.data, run.clipper, run.steps
    replicas = run.strategy.num_replicas_in_sync if run.strategy else 1
    warmup = build.warmup_updates(options, steps)
    clip = "no clipping" if clipper is None else textwrap.shorten(repr(clipper), 160)
    gate = ", activation gate" if options.activation_gate else ""
    kind = devices.device_kind() + ("s" if replicas > 1 else "")
    precision = {"none": "float32"}.get(options.mixed_precision, f"mixed {options.mixed_precision}")
    schedule = f"warm-up of {counted(warmup, 'update')}, then cosine" if warmup else "cosine"
    sizes = (data.train.size, data.validation.size, data.test.size)
    lines = [
        f"{run.recipe.name}: {run.exported.count_params():,} parameters, {clip}{gate}",
        f"  {options.optimizer} at {options.learning_rate:g} ({schedule}), "
        f"{counted(options.epochs, 'epoch')} of {counted(steps, 'step')}, "
        f"batch {options.batch_size}, seed {options.seed}",
        f"  {data.name}: {sizes[0]:,} training, {sizes[1]:,} validation, {sizes[2]:,} test "
        f"examples{f' ({data.note})' if data.note else ''}; on {replicas} {kind} in {precision}",
        f"  results in {run.folder}",
    ]
    if start >= options.epochs * steps:
        lines.append("  finished: all steps are done, and nothing is trained")
    elif start:
        epoch, step = divmod(start, steps)
        done = f"{counted(start, 'step')} done"
        lines.append(f"  going on from epoch {epoch + 1}, step {step + 1} ({done})")
    return lines


def warnings(options: Options) -> list[str]:
    """What the options allow and hardly anybody wants."""
    lines = []
    if options.optimizer == "sgd" and options.momentum == 0:
        lines.append(
            "plain SGD; the authors of the method advise an adaptive optimizer such as adamw"
        )
    if options.mixed_precision == "float16" and devices.device_kind() == "CPU":
        lines.append(
            "float16 on a CPU takes many times as long as float32, which --mixed-precision none "
            "gives"
        )
    return lines


def print_result(recipe: Recipe, result: Result) -> None:
    """The closing table and the two last lines that scripts read."""
    table = Table(title=f"{recipe.name} on {result.data.name}", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for row in _rows(recipe, result):
        table.add_row(*row)
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
        rows.append(("updates left out", f"{skipped} (gradients that were not finite)"))
    rows.append(("results in", str(result.output)))
    if not result.kept:
        rows.append(("note", "no epoch met the rule --select-best: no best.keras"))
    return rows
