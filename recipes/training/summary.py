"""The warnings before a run and the table of its results."""

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from recipes.training import devices
from recipes.training.option_table import Options
from recipes.training.recipe import Recipe, Result


def warnings(options: Options) -> list[str]:
    """Warnings about unusual options."""
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
