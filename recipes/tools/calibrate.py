"""Clipping thresholds from a recipe's own gradients.

    python recipes/tools/calibrate.py resnet50
    python recipes/tools/calibrate.py resnet50 --percentile 95 --epochs 4 --dataset cifar10
    python recipes/resnet50.py --clip-config runs/calibration-resnet50/clip-update_ratio.json

Trains the recipe for all updates of its run, or `--steps`, measures each layer's gradients, and
discards the weights. Other options are passed to the recipe. It trains without a clip, because a
clip changes the norms; if a recipe diverges without one, give one, such as `--clipper norm
--max-norm 1`.

Writes into `runs/calibration-RECIPE` (or `--output`):

- `clip-KIND.json`, for `--clip-config`: one threshold per layer for each kind of clipper, the
  percentile over all updates;
- `clip-KIND-schedule.json`, the same as a schedule over `--segments` parts of the run, for norms
  that drift;
- `clip-percentile.json`, a `PercentileClip`, which adapts to the last norms of each layer;
- `calibration.csv`, `calibration.png`, and `watched.npz`, the samples: a different percentile then
  needs no new training.

The table at the end shows how many norms each would have clipped, in total and in each eighth of
the run. If norms fall a hundredfold in the first epoch, as in ResNet-50, a constant at the 90th
percentile clips nearly every early update and none later; the schedule and the percentile clipper
clip about evenly throughout.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shlex
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

try:
    from recipes.command_line import Parser, exit_status, import_tensorflow
    from recipes.errors import RecipeError, TrainingDiverged
    from recipes.plugin import files
    from recipes.registry import RECIPES, find_recipe, script_of
    from recipes.tools import study
    from recipes.training import options as opts
    from recipes.training.folder import RUNS, check_options, folder_named
    from recipes.training.options import Options
except ModuleNotFoundError as error:
    sys.exit(f"error: no module {error.name}: run `make venv`, then .venv/bin/python (README.md)")

SEGMENTS = 8
#: Fewest updates in a segment of the run.
LEAST = 20
WATCHED = "watched.npz"
_DAMAGED = (AttributeError, EOFError, KeyError, OSError, TypeError, ValueError)
#: Window of `PercentileClip`, short enough for norms that fall in the first epoch.
WINDOW = 20
EIGHTHS = 8
#: Range of the clipped share in each eighth of the run within which a clip counts as even.
FITS = (0.02, 0.3)


# ------------------------------------------------------------------------------------- watching


def watch(recipe, options: Options, steps: int | None, percentile: float):
    """A `keras_gradclip.Calibration` of the recipe's first `steps` updates; None: its whole run.

    Raises:
        RecipeError: invalid options, more steps than the run has, or a run that diverges.
    """
    import_tensorflow()
    import keras_gradclip as kgc
    from recipes.training.build import prepared
    from recipes.training.callbacks import StopAtNonFinite

    with prepared(recipe, options) as run:
        updates = options.epochs * run.feed.steps // options.accumulate
        if steps is not None and steps > updates:
            raise RecipeError(
                f"--steps {steps}: the run has {updates} updates; give fewer steps or more --epochs"
            )
        count = steps or max(1, updates)
        run.create_state()
        chosen = options.clipping if options.clipper == "exponential" else {}
        callbacks = [StopAtNonFinite(skips=options.skip_nonfinite)]
        if options.verbose != "quiet":
            callbacks.append(_progress(count * options.accumulate))
        try:
            return kgc.calibrate(
                run.model,
                run.feed.training(0),
                steps=count,
                percentile=percentile,
                callbacks=callbacks,
                **{name: value for name, value in chosen.items() if name == "beta"},
            )
        except TrainingDiverged as error:
            raise RecipeError(
                f"training diverged at step {error.step}: there are no gradients to take "
                "thresholds from. Lower --learning-rate, or clip with --clipper"
            ) from None
        except ValueError as error:
            raise RecipeError(str(error)) from error


def _progress(batches: int) -> Any:
    """A Keras callback that prints a line at every tenth of the steps, with the remaining time."""
    import keras

    numbers, begun = itertools.count(1), time.monotonic()

    def tell(batch, logs=None):
        done = next(numbers)
        if done % max(1, batches // 10) == 0:
            left = study.duration((time.monotonic() - begun) / done * (batches - done))
            loss = (logs or {}).get("loss", math.nan)
            print(f"measured {done} of {batches} steps, loss {loss:.3f}; {left} left", flush=True)

    return keras.callbacks.LambdaCallback(on_train_batch_end=tell)


def save_watched(path: Path, found) -> None:
    """Writes the samples of a `Calibration`."""
    from keras_gradclip.diagnostics.calibration import SETTINGS

    rest = {name: getattr(found, name) for name in ("layers", "kernels", *SETTINGS)}

    def write(scratch):
        arrays = {kind: values.astype("float32") for kind, values in found.samples.items()}
        np.savez_compressed(scratch, **arrays, rest=np.array(json.dumps(rest)))

    files.replace_file(path, write)


def load_watched(path: Path, percentile: float):
    """The `Calibration` of saved samples, at a percentile.

    Raises:
        RecipeError: the file is damaged.
    """
    import_tensorflow()
    import keras_gradclip as kgc

    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        rest = json.loads(str(arrays.pop("rest")))
        samples = {kind: values.astype("float64") for kind, values in arrays.items()}
        return kgc.Calibration(
            rest.pop("layers"), rest.pop("kernels"), samples, percentile=percentile, **rest
        )
    except (*_DAMAGED, zipfile.BadZipFile) as error:
        raise RecipeError(
            f"{path}: cannot be read ({error}); delete it to measure again"
        ) from error


# ------------------------------------------------------------- what each threshold would clip


@dataclasses.dataclass(frozen=True)
class Choice:
    """A file for `--clip-config`, and the (layer, update) pairs that it would have clipped.

    Attributes:
        name: the file's name.
        hit: a mask `[updates, layers]`, 1 where it clips; NaN without a threshold.
    """

    name: str
    hit: np.ndarray

    @property
    def shares(self) -> list[float]:
        """The clipped share, in 0..1, of each eighth of the run."""
        parts = [part for part in np.array_split(self.hit, EIGHTHS) if len(part)]
        return [float(np.nanmean(part)) for part in parts]

    @property
    def overall(self) -> float:
        """The clipped share of the whole run."""
        return float(np.nanmean(self.hit))

    @property
    def fits(self) -> bool:
        """True if it clips in all parts of the run, and in none too much."""
        return FITS[0] <= min(self.shares) and max(self.shares) <= FITS[1]


def choices(found, segments: int, output: Path) -> list[Choice]:
    """Writes the files for `--clip-config`; returns a `Choice` for each."""
    import keras_gradclip as kgc

    result = []
    measured = [kind for kind in found.thresholds if any(found.thresholds[kind].values())]
    for parts in dict.fromkeys((1, segments)):
        for kind in measured:
            name = f"clip-{kind}{'-schedule' if parts > 1 else ''}.json"
            found.save(output / name, kind, parts)
            result.append(Choice(name, clipped(found, kind, parts)))
    follows = kgc.PercentileClip(found.percentile, window=WINDOW, scope="layer")
    files.write_json(output / "clip-percentile.json", {"clipper": kgc.serialize(follows)})
    hit = clipped_by_percentile(found.samples["norm"], found.percentile)
    return [*result, Choice("clip-percentile.json", hit)]


def clipped(found, kind: str, segments: int) -> np.ndarray:
    """A mask `[updates, layers]` of samples above their threshold; NaN without one."""
    samples, limits = found.samples[kind], found.limits(kind, segments)
    return np.where(np.isnan(samples) | np.isnan(limits), np.nan, samples > limits)


def clipped_by_percentile(norms: np.ndarray, percentile: float, window: int = WINDOW):
    """A mask of the norms `[updates, layers]` that `PercentileClip` would clip."""
    import pandas as pd

    last = pd.DataFrame(norms).rolling(window, min_periods=1)
    return (norms > last.quantile(percentile / 100).to_numpy()).astype(float)


def steady(found_choices: list[Choice]) -> Choice:
    """The simplest of the norm clippers that clips evenly; else the percentile clipper."""
    by_name = {c.name: c for c in found_choices}
    for name in ("clip-norm.json", "clip-norm-schedule.json"):
        if name in by_name and by_name[name].fits:
            return by_name[name]
    return by_name["clip-percentile.json"]


def write_table(path: Path, found) -> None:
    """Writes one row per layer: its norms, each clipper's percentile, and the saved threshold."""
    import pandas as pd

    spread = {"norm_min": 0, "norm_p10": 10, "norm_median": 50, "norm_p90": 90, "norm_max": 100}
    table = pd.DataFrame({"layer": found.layers})
    for name, percentile in spread.items():
        table[name] = np.percentile(found.samples["norm"], percentile, axis=0)
    for kind, thresholds in found.thresholds.items():
        table[kind] = table["layer"].map(thresholds)
    for kind in found.thresholds:
        table[f"{kind}_saved"] = [found.saved_threshold(kind, layer) for layer in found.layers]
    files.write_text(path, table.to_csv(index=False, float_format="%.6g"))


def draw(path: Path, found, segments: int, title: str) -> None:
    """Draws each layer's range and threshold, and norms and clipped share over the run."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    norms = found.samples["norm"]
    count = len(found.layers)
    shown = [k for k in ("update_ratio", "norm") if any((found.thresholds.get(k) or {}).values())]
    height = max(6.5, min(2 + 0.11 * count, 26))
    figure = Figure(figsize=(7 + 6 * len(shown), height), layout="constrained")
    grid = figure.add_gridspec(2, len(shown) + 1)
    panels = [figure.add_subplot(grid[:, i]) for i in range(len(shown))]
    for axis, kind in zip(panels, shown, strict=True):
        _draw_layers(axis, found, kind)

    over = figure.add_subplot(grid[0, -1])
    steps = np.arange(1, len(norms) + 1)
    alive = np.where(norms > 0, norms, np.nan)
    over.fill_between(
        steps, *np.nanpercentile(alive, (10, 90), axis=1), alpha=0.25, label="layers, 10 to 90 %"
    )
    over.plot(steps, np.nanmedian(alive, axis=1), lw=0.8, label="median layer")
    over.plot(steps, found.samples["global"], lw=0.8, color="black", label="all layers")
    over.set(ylabel="norm of the gradient", xlabel="update")
    over.legend(fontsize="small")
    over.set_yscale("log")

    share = figure.add_subplot(grid[1, -1])
    lines = {f"{kind}: one threshold per layer": clipped(found, kind, 1) for kind in shown}
    if segments > 1 and "norm" in shown:
        lines[f"norm: {segments} thresholds, one after another"] = clipped(found, "norm", segments)
    lines[f"PercentileClip of the last {WINDOW}"] = clipped_by_percentile(norms, found.percentile)
    smooth = max(1, len(norms) // 40)
    for name, hit in lines.items():
        means = [100 * np.nanmean(hit[i : i + smooth]) for i in range(0, len(hit), smooth)]
        share.plot(steps[::smooth], means, label=name)
    share.axhspan(5, 15, color="grey", alpha=0.15)
    share.set(ylabel="layers clipped, % (grey: 5 to 15)", xlabel="update", ylim=(-3, 103))
    share.legend(fontsize="small")
    for axis in (over, share):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in (*panels, over, share):
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    files.replace_file(path, lambda scratch: figure.savefig(scratch, dpi=110))


def _draw_layers(axis, found, kind: str) -> None:
    """Draws, for a kind of clipper, each layer's range of figures and the saved threshold."""
    from keras_gradclip.diagnostics.calibration import kinds

    names = [n for i, n in enumerate(found.layers) if np.isfinite(found.samples[kind][:, i]).all()]
    figures = found.samples[kind][:, [found.layers.index(name) for name in names]]
    at = np.arange(len(names))
    low, median, high = np.percentile(figures, (10, 50, 90), axis=0)
    axis.hlines(at, np.maximum(low, 1e-30), high, color="C0", alpha=0.5, label="10 to 90 %")
    axis.scatter(median, at, s=9, color="C0", label="median")
    saved = [found.saved_threshold(kind, name) or np.nan for name in names]
    label = f"clip-{kind}.json ({found.percentile:g}th percentile"
    label += ", capped)" if saved != [found.thresholds[kind][n] for n in names] else ")"
    axis.scatter(saved, at, s=14, color="C3", marker="|", label=label)
    every = -(-len(names) // 120)
    axis.set_yticks(at[::every], names[::every], fontsize=6 if len(names) > 40 else 9)
    axis.set(ylim=(len(names) - 0.5, -0.5), xlabel=kinds()[kind])
    study.log_axis(axis)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize="small")


# -------------------------------------------------------------------------------------- command


def show(found, found_choices: list[Choice], output: Path, command: str) -> None:
    """Prints the tables, and the command that trains with the result."""
    import pandas as pd

    print(found)
    lines = [
        {
            "file": choice.name,
            "in all": f"{100 * choice.overall:.1f} %",
            "in each eighth of the run": " ".join(f"{100 * s:.0f}" for s in choice.shares) + " %",
        }
        for choice in found_choices
    ]
    study.show(
        pd.DataFrame(lines),
        "what each would have clipped of the measured (layer, update) pairs\n(KIND: one threshold "
        "per layer; KIND-schedule: several, one after another; percentile: that of the layer's "
        f"last {WINDOW} norms)",
    )
    by_name = {choice.name: choice for choice in found_choices}
    bounded, constant = (by_name.get(f"clip-{kind}.json") for kind in ("update_ratio", "norm"))
    even = steady(found_choices)
    low, high = (100 * f(even.shares) for f in (min, max))
    if constant is not None and not constant.fits:
        remedy = f"no file for norms clips evenly ({even.name}: {low:.0f} to {high:.0f} %)."
        if even.fits:
            remedy = f"{even.name} clips evenly."
        first, *_, last = (f"{100 * share:.0f} %" for share in constant.shares)
        print(
            f"The norms drift: one threshold per layer clips {first} of the first eighth of the "
            f"run and {last} of the last; {remedy}"
        )
    if found.updates < LEAST:
        print(
            f"{found.updates} updates are few for a percentile: measure more (--steps, --epochs)."
        )
    suggested = [bounded, constant, even if even.fits else None]
    by_name = {choice.name: choice for choice in suggested if choice is not None}
    for name, choice in by_name.items():
        if not choice.overall:
            print(f"{name} would have clipped nothing in this run: it is only a guard.")
    print(f"results in {output}; train with")
    for name in by_name:
        print(f"  {command} --clip-config {output / name}")


def watched_options(recipe, rest: list[str]) -> Options:
    """The recipe's options, unclipped unless `rest` names a clipper or a threshold."""
    parsed = opts.parse(recipe, rest)
    if opts.clipping_names() & set(parsed.given):
        return parsed.options
    return opts.resolve(recipe, parsed.config, {**parsed.given, "clipper": "none"})


def calibrate(recipe, rest: list[str], percentile: float, steps, segments: int, output: Path):
    """Measures the recipe, unless `output` has its samples, and writes the results.

    Returns:
        The `Calibration`, and a list of `Choice`.

    Raises:
        RecipeError: invalid or different options than in `output`, or a run that diverges.
    """
    if not 0 < percentile <= 100:
        raise RecipeError(f"--percentile {percentile:g}: must be above 0 and at most 100")
    if steps is not None and steps < 1:
        raise RecipeError(f"--steps {steps}: must be 1 or more")
    if segments < 1:
        raise RecipeError(f"--segments {segments}: must be 1 or more; 1 writes no schedules")
    options = watched_options(recipe, rest)
    if options.output or options.resume:
        raise RecipeError("--output and --resume of the recipe make no sense here")
    settings = {**options.saved, "steps": steps}
    path = output / "config.json"
    watched = output / WATCHED
    if watched.exists():
        check_options(path, recipe, settings)
        print(f"using the gradients measured before: {watched}")
        found = load_watched(watched, percentile)
    else:
        found = watch(recipe, options, steps, percentile)
        output.mkdir(parents=True, exist_ok=True)
        files.write_json(path, settings)
        save_watched(watched, found)
    segments = max(1, min(segments, found.updates // LEAST))
    found_choices = choices(found, segments, output)
    write_table(output / "calibration.csv", found)
    draw(output / "calibration.png", found, segments, f"{recipe.name}: gradients and thresholds")
    return found, found_choices


def training_command(name: str, rest: list[str]) -> str:
    """The command that trains the recipe with the same options, except the clipper's."""
    recipe = find_recipe(name)
    clipping = opts.clipping_names()
    given = {n: v for n, v in opts.parse(recipe, rest).given.items() if n not in clipping}
    if "task" in recipe.settings:  # two recipes of one script
        given = {"task": recipe.settings["task"]} | given
    return shlex.join(["python", script_of(name), *opts.as_words(recipe, given)])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Exit status: 0; 2 for an invalid flag or a failed run; 130 after Ctrl-C."""
    program = "python recipes/tools/calibrate.py"
    parser = Parser(program, __doc__, usage=f"{program} RECIPE [--FLAG VALUE ...]")
    parser.add_argument("recipe", choices=list(RECIPES))
    parser.add_argument("--percentile", type=float, default=90.0, help="default: 90")
    parser.add_argument("--steps", type=int, help="updates to measure (default: the whole run)")
    parser.add_argument(
        "--segments",
        type=int,
        default=SEGMENTS,
        help=f"parts of a schedule, of at least {LEAST} updates each (default: {SEGMENTS})",
    )
    parser.add_argument("--output", help="folder (default: runs/calibration-RECIPE)")

    def work() -> None:
        arguments, rest = parser.parse_known_args(argv)
        name, output = arguments.recipe, arguments.output
        recipe = find_recipe(name)
        opts.parse(recipe, rest, parser.flags)  # suggests one of them for a misspelt flag
        output = folder_named(str(RUNS / f"calibration-{name}") if output is None else output)
        numbers = (arguments.percentile, arguments.steps, arguments.segments)
        found, found_choices = calibrate(recipe, rest, *numbers, output)
        show(found, found_choices, output, training_command(name, rest))

    return exit_status(work, interrupted=": nothing was written; the same command starts anew")


if __name__ == "__main__":
    sys.exit(main())
