"""Clipping thresholds from a recipe's own gradients.

    python recipes/tools/calibrate.py resnet50
    python recipes/tools/calibrate.py resnet50 --percentile 95 --epochs 4 --dataset cifar10
    python recipes/resnet50.py --clip-config runs/calibration-resnet50/clip-update_ratio.json

Trains the recipe for all updates of its run, or `--steps`, measures each layer's gradients, and
discards the weights. Other options are passed to the recipe. It trains without a clip, because a
clip changes the norms; if a recipe diverges without one, give one, such as `--clipper norm
--max-norm 1`. A `--beta` or `--eps` of that clipper is the one of the written files, too.

Writes into `runs/calibration-RECIPE` (or `--output`), over the files of an earlier calibration:

- `clip-KIND.json`, for `--clip-config`: for each kind of clipper, one threshold per layer, the
  percentile over all updates;
- `clip-KIND-schedule.json`, for a run of 160 updates or more: one threshold per layer and eighth of
  the run;
- `calibration.png`: each layer's range and threshold, and the norms over the run.

The table at the end shows how many of the measured norms each file would have clipped, in total and
in each eighth of the run. If norms fall a hundredfold in the first epoch, as in ResNet-50, a
constant at the 90th percentile clips nearly every early update and none later; a schedule clips
about evenly throughout, as does `--clipper percentile`, which adapts to the last norms.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from recipes.command_line import Parser, exit_status, import_tensorflow
    from recipes.errors import RecipeError, TrainingDiverged, plain_errors
    from recipes.plugin import files
    from recipes.registry import RECIPES, find_recipe
    from recipes.tools import study
    from recipes.training import Recipe
    from recipes.training import options as opts
    from recipes.training.folder import RUNS, folder_named
    from recipes.training.options import Options
    from recipes.words import show_table
except ModuleNotFoundError as error:
    sys.exit(f"error: no module {error.name}: run `make venv`, then .venv/bin/python (README.md)")

if TYPE_CHECKING:  # slow imports that flags do not need
    import pandas as pd

    from keras_gradclip import Calibration

PARTS = 8  # of the run, in the table and in a schedule
LEAST = 20  # updates in a part of a schedule


def options_of(recipe: Recipe, rest: Sequence[str]) -> Options:
    """The recipe's options, without a clip unless `rest` names a clipper or a threshold.

    Raises:
        RecipeError: an invalid option, or one that a calibration cannot use.
    """
    parsed = opts.parse(recipe, rest)
    if parsed.options.resume:
        raise RecipeError("--resume: a calibration starts anew each time")
    if opts.clipping_names() & set(parsed.given):
        return parsed.options
    return opts.resolve(recipe, parsed.config, {**parsed.given, "clipper": opts.NONE})


def measure(recipe: Recipe, options: Options, steps: int | None, percentile: float) -> Calibration:
    """The `keras_gradclip.Calibration` of a recipe's first `steps` updates; None: its whole run.

    Raises:
        RecipeError: invalid options, more steps than the run has, or a run that diverges.
    """
    import_tensorflow()
    import keras

    import keras_gradclip as kgc
    from recipes.training.build import prepared
    from recipes.training.callbacks import StopAtNonFinite

    with prepared(recipe, options) as run, plain_errors():
        updates = max(1, options.epochs * run.feed.steps // options.accumulate)
        if steps is not None and steps > updates:
            raise RecipeError(
                f"--steps {steps}: the run has {updates} updates; give fewer steps or more --epochs"
            )
        count = steps or updates
        run.create_state()
        callbacks: list[Any] = [StopAtNonFinite(skips=options.skip_nonfinite)]
        if options.verbose != "quiet":
            bar = keras.utils.Progbar(
                count * options.accumulate,
                verbose=1 if sys.stdout.isatty() else 2,
                stateful_metrics=["loss"],
            )
            callbacks.append(
                keras.callbacks.LambdaCallback(
                    on_train_batch_end=lambda batch, logs: bar.add(1, [("loss", logs["loss"])])
                )
            )
        try:
            same = {n: v for n, v in options.clipping.items() if n in ("beta", "eps")}
            found = kgc.calibrate(
                run.model, run.feed.training(0), count, percentile, callbacks=callbacks, **same
            )
        except TrainingDiverged as error:
            raise RecipeError(
                f"training diverged at step {error.step}: there are no gradients to take "
                "thresholds from. Lower --learning-rate, or clip with --clipper"
            ) from None
        assert isinstance(found, kgc.Calibration)  # of one optimizer
        return found


def write_clippers(found: Calibration, output: Path) -> pd.DataFrame:
    """Writes the files for `--clip-config`.

    Returns:
        A row of text per file: its name and the shares that it would have clipped.
    """
    import numpy as np
    import pandas as pd

    rows = []
    for parts in (1, PARTS) if found.updates >= LEAST * PARTS else (1,):
        for kind, thresholds in found.thresholds.items():
            if not any(thresholds.values()):
                continue
            name = f"clip-{kind}{'-schedule' if parts > 1 else ''}.json"
            found.save(output / name, kind, parts)
            samples, limits = found.samples[kind], found.limits(kind, parts)
            without = np.isnan(samples) | np.isnan(limits)
            clipped = np.where(without, np.nan, 100.0 * (samples > limits))
            eighths = [part for part in np.array_split(clipped, PARTS) if len(part)]
            shares = " ".join(f"{np.nanmean(part):.0f}" for part in eighths)
            rows.append((name, f"{np.nanmean(clipped):.1f}", shares))
    return pd.DataFrame(rows, columns=["file", "clipped, %", "in each eighth of the run, %"])


def draw(path: Path, found: Calibration, title: str) -> None:
    """Draws each layer's range and threshold, and the norms over the run."""
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    kinds = [kind for kind in ("update_ratio", "norm") if any(found.thresholds[kind].values())]
    height = max(5.0, min(2 + 0.11 * len(found.layers), 26))  # inches
    figure = Figure(figsize=(6 * len(kinds) + 6, height), layout="constrained")
    *panels, over = figure.subplots(1, len(kinds) + 1)
    for axis, kind in zip(panels, kinds, strict=True):
        _draw_layers(axis, found, kind)
    norms = np.where(found.samples["norm"] > 0, found.samples["norm"], np.nan)
    updates = np.arange(1, len(norms) + 1)
    low, median, high = np.nanpercentile(norms, (10, 50, 90), axis=1)
    over.fill_between(updates, low, high, alpha=0.25, label="layers, 10 to 90 %")
    over.plot(updates, median, lw=0.8, label="median layer")
    over.plot(updates, found.samples["global"], lw=0.8, color="black", label="all layers")
    over.set(ylabel="norm of the gradient", xlabel="update", yscale="log")
    over.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in (*panels, over):
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize="small")
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    files.replace_file(path, lambda scratch: figure.savefig(scratch, dpi=110))


def _draw_layers(axis: Any, found: Calibration, kind: str) -> None:
    """Draws, for a kind of clipper, each layer's range of figures and the saved threshold."""
    import numpy as np

    from keras_gradclip.diagnostics.calibration import kinds

    shown = [i for i in range(len(found.layers)) if np.isfinite(found.samples[kind][:, i]).all()]
    names, at = [found.layers[i] for i in shown], np.arange(len(shown))
    low, median, high = np.percentile(found.samples[kind][:, shown], (10, 50, 90), axis=0)
    axis.hlines(at, np.maximum(low, 1e-30), high, color="C0", alpha=0.5, label="10 to 90 %")
    axis.scatter(median, at, s=9, color="C0", label="median")
    saved = found.limits(kind)[0, shown]
    axis.scatter(saved, at, s=14, color="C3", marker="|", label=f"clip-{kind}.json")
    axis.set_yticks(at, names, fontsize=6 if len(names) > 40 else 9)
    axis.set(ylim=(len(names) - 0.5, -0.5), xlabel=kinds()[kind])
    study.log_axis(axis)


def calibrate(
    recipe: Recipe, rest: Sequence[str], steps: int | None, percentile: float, output: Path
) -> Calibration:
    """Measures the recipe with the options `rest`, writes the files, and prints the tables."""
    if not 0 < percentile <= 100:
        raise RecipeError(f"--percentile {percentile:g}: must be above 0 and at most 100")
    if steps is not None and steps < 1:
        raise RecipeError(f"--steps {steps}: must be 1 or more")
    found = measure(recipe, options_of(recipe, rest), steps, percentile)
    output.mkdir(parents=True, exist_ok=True)
    table = write_clippers(found, output)
    draw(output / "calibration.png", found, f"{recipe.name}: gradients and thresholds")
    print(found)
    show_table(table, "share of the measured layers and updates that each file would have clipped")
    print(f"results in {output}")
    if (suggested := "clip-update_ratio.json") in set(table["file"]):
        print(f"train with the same options and --clip-config {output / suggested}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Exit status: 0; 2 for an invalid flag or a failed run; 130 after Ctrl-C."""
    program = "python recipes/tools/calibrate.py"
    parser = Parser(program, __doc__, usage=f"{program} RECIPE [--FLAG VALUE ...]")
    parser.add_argument("recipe", choices=list(RECIPES))
    parser.add_argument("--percentile", type=float, default=90.0, help="default: 90")
    parser.add_argument("--steps", type=int, help="updates to measure (default: the whole run)")
    parser.add_argument("--output", help="folder (default: runs/calibration-RECIPE)")

    def work() -> None:
        given, rest = parser.parse_known_args(argv)
        recipe = find_recipe(given.recipe)
        opts.parse(recipe, rest, parser.flags)  # suggests one of them for a misspelt flag
        usual = str(RUNS / f"calibration-{given.recipe}")
        output = folder_named(usual if given.output is None else given.output)
        calibrate(recipe, rest, given.steps, given.percentile, output)

    return exit_status(work, interrupted=": nothing was written; the same command starts anew")


if __name__ == "__main__":
    sys.exit(main())
