"""Clipping thresholds from a recipe's own gradients.

    python recipes/tools/calibrate.py resnet50
    python recipes/tools/calibrate.py resnet50 --percentile 95 --epochs 4 --dataset cifar10
    python recipes/resnet50.py --clip-config runs/calibration-resnet50/clip-update_ratio.json

Trains the recipe (options that this command does not know go to it) for as many updates as its run
has, or `--steps`, watches each layer's gradient, and throws the weights away. It trains unclipped,
because the clip that is going to be replaced changes the norms: under ResNet-50's own
`AbsoluteClip` they end at a third, and thresholds taken there clip six norms in ten. A recipe that
diverges unclipped is watched with a clip that holds it, such as `--clipper norm --max-norm 1`.

Writes into `runs/calibration-RECIPE` (or `--output`):

- `clip-KIND.json`, for each kind of clipper one threshold a layer, for `--clip-config`: the
  percentile over all updates;
- `clip-KIND-schedule.json`, the same for each of `--segments` parts of the run, as a schedule, for
  norms that drift;
- `clip-percentile.json`, a `PercentileClip` that follows the last norms of each layer by itself;
- `calibration.csv`, `calibration.png`, and `watched.npz`, from which the same command with another
  percentile goes on without training again.

The table at the end says how often each would have clipped what was watched, in all and in each
eighth of the run. Where norms fall a hundredfold in the first epoch, as in ResNet-50, a constant at
the 90th percentile clips nearly every early update and none later: a guard for the warm-up. The
schedule and the percentile clipper clip about evenly throughout.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import shlex
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

try:
    from recipes.command_line import Parser, exit_status, import_tensorflow
    from recipes.errors import RecipeError, TrainingDiverged
    from recipes.plugin import files
    from recipes.registry import RECIPES, find_recipe, script_of
    from recipes.tools._choices import WINDOW, Choice, choices, draw, steady, write_table
    from recipes.training import options as opts
    from recipes.training.folder import RUNS, check_options, folder_named
    from recipes.training.options import Options
except ModuleNotFoundError as error:
    sys.exit(f"error: no module {error.name}: run `make venv`, then .venv/bin/python (README.md)")

SEGMENTS = 8
#: Updates that a part of the run must have for a percentile of its own.
LEAST = 20
WATCHED = "watched.npz"


# ------------------------------------------------------------------------------------- watching


def watch(recipe, options: Options, steps: int | None, percentile: float):
    """A `keras_gradclip.Calibration` of the recipe's first `steps` updates; None: its whole run.

    Raises:
        RecipeError: options that cannot be, more steps than the run has, or a run that diverges.
    """
    import_tensorflow()
    import keras_gradclip as kgc
    from recipes.training.build import prepared
    from recipes.training.callbacks import StopAtNonFinite

    with prepared(recipe, options) as run:
        updates = options.epochs * run.steps // options.accumulate
        if steps is not None and steps > updates:
            raise RecipeError(
                f"--steps {steps}: the run has {updates} updates; give fewer steps or more --epochs"
            )
        count = steps or max(1, updates)
        run.create_state()
        beta = {}
        if options.clipper == "exponential" and "beta" in options.clipping:
            beta = {"beta": options.clipping["beta"]}
        try:
            with _progress(count * options.accumulate, options.verbose) as progress:
                return kgc.calibrate(
                    run.model,
                    run.stream(0),
                    steps=count,
                    percentile=percentile,
                    callbacks=[StopAtNonFinite(skips=options.skip_nonfinite), progress],
                    **beta,
                )
        except TrainingDiverged as error:
            raise RecipeError(
                f"training diverged at step {error.step}: there is nothing to take thresholds "
                "from. Lower --learning-rate, or watch it with a --clipper that holds it"
            ) from None
        except ValueError as error:
            raise RecipeError(str(error)) from error


@contextlib.contextmanager
def _progress(batches: int, verbose: str) -> Iterator[Any]:
    """A Keras callback: a bar on a terminal, else a line every tenth of the way."""
    import keras
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    shown = sys.stdout.isatty() if verbose == "auto" else verbose == "bar"
    columns = ("watching", BarColumn(), MofNCompleteColumn(), "{task.fields[loss]}")
    with Progress(*columns, TimeRemainingColumn(), disable=not shown) as bar:
        task, numbers = bar.add_task("", total=batches, loss=""), itertools.count(1)

        def tell(batch, logs=None):
            done, loss = next(numbers), f"loss {(logs or {}).get('loss', math.nan):.3f}"
            bar.update(task, completed=done, loss=loss)
            if not shown and verbose != "quiet" and done % max(1, batches // 10) == 0:
                print(f"watched {done} of {batches} steps, {loss}", flush=True)

        yield keras.callbacks.LambdaCallback(on_train_batch_end=tell)


def save_watched(path: Path, found) -> None:
    """Writes the samples of a `Calibration`."""
    from keras_gradclip.diagnostics.calibration import SETTINGS

    rest = {name: getattr(found, name) for name in ("layers", "kernels", *SETTINGS)}

    def write(scratch):
        arrays = {kind: values.astype("float32") for kind, values in found.samples.items()}
        np.savez_compressed(scratch, **arrays, rest=np.array(json.dumps(rest)))

    files.replace_file(path, write)


_NO_SAMPLES = (
    *(AttributeError, EOFError, KeyError, OSError, TypeError, ValueError),
    zipfile.BadZipFile,
)


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
        return kgc.Calibration.of_samples(
            rest.pop("layers"), rest.pop("kernels"), samples, percentile=percentile, **rest
        )
    except _NO_SAMPLES as error:
        raise RecipeError(f"{path}: cannot be read ({error}); delete it to watch again") from error


def parts_of(found, segments: int) -> int:
    """As many parts of the updates watched as have enough of them, at most `segments`."""
    return max(1, min(segments, found.updates // LEAST))


# -------------------------------------------------------------------------------------- command


def show(found, found_choices: list[Choice], segments: int, output: Path, command: str) -> None:
    """The tables on the terminal, and the command that trains with the result."""
    from rich.console import Console
    from rich.table import Table

    print(found)
    table = Table(
        title="what each would have clipped of the (layer, update) pairs watched",
        caption=f"KIND: one threshold a layer; KIND-schedule: {segments} in a row; "
        f"percentile: that of the layer's last {WINDOW} norms",
    )
    table.add_column("file", no_wrap=True)
    table.add_column("in all", justify="right")
    table.add_column("in each eighth of the run")
    for choice in found_choices:
        eighths = " ".join(f"{100 * s:.0f}" for s in choice.shares) + " %"
        table.add_row(choice.name, f"{100 * choice.overall:.1f} %", eighths)
    Console().print(table)
    by_name = {choice.name: choice for choice in found_choices}
    bounded, constant = (by_name.get(f"clip-{kind}.json") for kind in ("update_ratio", "norm"))
    even = steady(found_choices)
    if constant is not None and not constant.fits:
        low, high = (100 * f(even.shares) for f in (min, max))
        print(
            "The norms drift: one threshold a layer clips "
            f"{100 * constant.shares[0]:.0f} % of the first eighth of the run and "
            f"{100 * constant.shares[-1]:.0f} % of the last; "
            + (
                f"{even.name} clips evenly."
                if even.fits
                else f"no file for norms clips evenly ({even.name}: {low:.0f} to {high:.0f} %)."
            )
        )
    if found.updates < LEAST:
        print(f"{found.updates} updates are few for a percentile: watch more (--steps, --epochs).")
    suggested = [bounded, constant, even if even.fits else None]
    by_name = {choice.name: choice for choice in suggested if choice is not None}
    for name, choice in by_name.items():
        if not choice.overall:
            print(f"{name} would have clipped nothing of this: it is a guard alone.")
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
    """Watches the recipe, unless `output` holds it already, and writes the results.

    Returns:
        The `Calibration`, and a list of `Choice`.

    Raises:
        RecipeError: wrong options, `output` was begun with others, or a run that diverges.
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
    settings = opts.saved_options(recipe, options) | {"steps": steps}
    path = output / "config.json"
    watched = output / WATCHED
    if watched.exists():
        check_options(path, settings)
        print(f"using what was watched before: {watched}")
        found = load_watched(watched, percentile)
    else:
        found = watch(recipe, options, steps, percentile)
        output.mkdir(parents=True, exist_ok=True)
        files.write_json(path, settings)
        save_watched(watched, found)
    segments = parts_of(found, segments)
    found_choices = choices(found, segments, output)
    write_table(output / "calibration.csv", found)
    draw(output / "calibration.png", found, segments, f"{recipe.name}: gradients and thresholds")
    return found, found_choices


def training_command(name: str, rest: list[str]) -> str:
    """The command that trains the recipe with the same options, but for the clipper's."""
    recipe = find_recipe(name)
    clipping = opts.clipping_names()
    given = {n: v for n, v in opts.parse(recipe, rest).given.items() if n not in clipping}
    if "task" in recipe.settings:  # two recipes of one script
        given = {"task": recipe.settings["task"]} | given
    return shlex.join(["python", script_of(name), *opts.as_words(recipe, given)])


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, 2 for a mistake in the flags or a run that fails, 130 after Ctrl-C."""
    program = "python recipes/tools/calibrate.py"
    parser = Parser(program, __doc__, usage=f"{program} RECIPE [--FLAG VALUE ...]")
    parser.add_argument("recipe", choices=list(RECIPES))
    parser.add_argument("--percentile", type=float, default=90.0, help="default: 90")
    parser.add_argument("--steps", type=int, help="updates to watch (default: the whole run)")
    parser.add_argument(
        "--segments",
        type=int,
        default=SEGMENTS,
        help=f"parts of a schedule, of at least {LEAST} updates each (default: {SEGMENTS})",
    )
    parser.add_argument("--output", help="folder (default: runs/calibration-RECIPE)")

    def work() -> None:
        arguments, rest = parser.parse_known_args(argv)
        opts.parse(find_recipe(arguments.recipe), rest, parser.flags)
        usual = str(RUNS / f"calibration-{arguments.recipe}")
        output = folder_named(usual if arguments.output is None else arguments.output)
        found, found_choices = calibrate(
            find_recipe(arguments.recipe),
            rest,
            arguments.percentile,
            arguments.steps,
            arguments.segments,
            output,
        )
        segments = parts_of(found, arguments.segments)
        show(found, found_choices, segments, output, training_command(arguments.recipe, rest))

    return exit_status(work, interrupted=": nothing was written; the same command starts anew")


if __name__ == "__main__":
    sys.exit(main())
