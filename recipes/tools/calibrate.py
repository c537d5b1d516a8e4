"""Clipping thresholds from a recipe's own gradients.

    python recipes/tools/calibrate.py resnet50
    python recipes/tools/calibrate.py resnet50 --percentile 95 --epochs 4 --dataset cifar10
    python recipes/resnet50.py --clip-config runs/calibration-resnet50/clip-norm.json

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

import dataclasses
import functools
import json
import math
import shlex
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

if not __package__:  # run as a script: the folder above recipes/ holds its packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import recipes.tools  # noqa: F401  (changes to the environment that has what follows)

import keras
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

import keras_gradclip as kgc
from keras_gradclip._files import replace_file, write_csv, write_json
from recipes.command_line import Parser, exit_status
from recipes.errors import RecipeError
from recipes.registry import RECIPES, find_recipe, script_of
from recipes.training import options as opts
from recipes.training import prepared
from recipes.training.callbacks import NonFinite, StopAtNonFinite
from recipes.training.folder import RUNS, folder_named
from recipes.training.option_table import Options

SEGMENTS = 8
#: Updates that a part of the run must have for a percentile of its own.
LEAST = 20
#: What `PercentileClip` remembers: few enough to keep up with norms that fall in the first epoch.
WINDOW = 20
EIGHTHS = 8
#: More or less than this share of an eighth of the run, and a clip is called uneven.
FITS = (0.02, 0.3)
WATCHED = "watched.npz"


@dataclasses.dataclass(frozen=True)
class Choice:
    """A file for `--clip-config`, and what it would have clipped of the updates watched.

    Attributes:
        name: the file's name.
        shares: share of (layer, update) pairs clipped, for each eighth of the run, in 0..1.
        overall: the same over the whole run.
    """

    name: str
    shares: list[float]
    overall: float

    @property
    def fits(self) -> bool:
        """Whether it clips at all times, and at no time too much."""
        return FITS[0] <= min(self.shares) and max(self.shares) <= FITS[1]


# ------------------------------------------------------------------------------------- watching


def watch(recipe, options: Options, steps: int | None, folder: Path, percentile: float):
    """A `keras_gradclip.Calibration` of the recipe's first `steps` updates; None: its whole run.

    Raises:
        RecipeError: options that cannot be, more steps than the run has, or a run that diverges.
    """
    with prepared(recipe, options, folder) as run:

        class Stop(StopAtNonFinite):
            """Also at a gradient that is not finite: the losses may hide it for a while."""

            def on_train_batch_end(self, batch, logs=None):
                measured = self.step + 1 >= options.accumulate  # NaN before the first update
                norm = (logs or {}).get("grad_norm", 0.0)
                if measured and not self.skips and not math.isfinite(norm):
                    raise NonFinite(self.step)
                super().on_train_batch_end(batch, logs)

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
        progress = _progress(count * options.accumulate, options.verbose)
        try:
            return kgc.calibrate(
                run.model,
                run.stream(0),
                steps=count,
                percentile=percentile,
                callbacks=[Stop(skips=options.skip_nonfinite), progress],
                **beta,
            )
        except NonFinite as error:
            raise RecipeError(
                f"training diverged at step {error.step}: there is nothing to take thresholds "
                "from. Lower --learning-rate, or watch it with a --clipper that holds it"
            ) from None
        except ValueError as error:
            raise RecipeError(str(error)) from error
        finally:
            progress.close()


def _progress(batches: int, verbose: str):
    """A Keras callback: a bar on a terminal, else a line every tenth of the way."""

    class Show(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.done, self.loss = 0, float("nan")
            bar = sys.stdout.isatty() if verbose == "auto" else verbose == "bar"
            self.bar = None
            if bar:
                columns = ("watching", BarColumn(), MofNCompleteColumn(), "{task.fields[loss]}")
                self.bar = Progress(*columns, TimeRemainingColumn())
                self.task = self.bar.add_task("", total=batches, loss="")

        def on_train_begin(self, logs=None):
            if self.bar:
                self.bar.start()

        def on_train_batch_end(self, batch, logs=None):
            self.done += 1
            loss = f"loss {(logs or {}).get('loss', float('nan')):.3f}"
            if self.bar:
                self.bar.update(self.task, completed=self.done, loss=loss)
            elif verbose != "quiet" and self.done % max(1, batches // 10) == 0:
                print(f"watched {self.done} of {batches} steps, {loss}", flush=True)

        def on_train_end(self, logs=None):
            self.close()

        def close(self):
            if self.bar:
                self.bar.stop()

    return Show()


def save_watched(path: Path, found) -> None:
    """Writes the samples of a `Calibration`."""
    rest = {
        "layers": found.layers,
        "kernels": found.kernels,
        "nonfinite": found.nonfinite,
        "beta": found.beta,
        "eps": found.eps,
    }

    def write(scratch):
        arrays = {kind: values.astype("float32") for kind, values in found.samples.items()}
        np.savez_compressed(scratch, **arrays, rest=np.array(json.dumps(rest)))

    replace_file(path, write)


_NO_SAMPLES = (
    *(AttributeError, EOFError, KeyError, OSError, TypeError, ValueError),
    zipfile.BadZipFile,
)


def load_watched(path: Path, percentile: float):
    """The `Calibration` of saved samples, at a percentile.

    Raises:
        RecipeError: the file is damaged.
    """
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


# -------------------------------------------------------------------------------------- results


def parts_of(found, segments: int) -> int:
    """As many parts of the updates watched as have enough of them, at most `segments`."""
    return max(1, min(segments, found.updates // LEAST))


def choices(found, segments: int, output: Path) -> list[Choice]:
    """Writes the files for `--clip-config` and tells what each would have clipped."""
    result = []
    kinds = [kind for kind in found.thresholds if any(found.thresholds[kind].values())]
    for kind in kinds:
        name = f"clip-{kind}.json"
        replace_file(output / name, functools.partial(found.save, kind=kind))
        result.append(_choice(name, clipped(found, kind, 1)))
    for kind in kinds if segments > 1 else ():
        name = f"clip-{kind}-schedule.json"
        replace_file(output / name, functools.partial(found.save, kind=kind, segments=segments))
        result.append(_choice(name, clipped(found, kind, segments)))
    follows = kgc.PercentileClip(found.percentile, window=WINDOW, scope="layer")
    write_json(output / "clip-percentile.json", {"clipper": kgc.serialize(follows)})
    hit = clipped_by_percentile(found.samples["norm"], found.percentile)
    result.append(_choice("clip-percentile.json", hit))
    return result


def _choice(name: str, hit: np.ndarray) -> Choice:
    parts = [part for part in np.array_split(hit, EIGHTHS) if len(part)]
    return Choice(name, [float(np.nanmean(p)) for p in parts], float(np.nanmean(hit)))


def clipped(found, kind: str, segments: int) -> np.ndarray:
    """Which samples lie above their threshold: `[updates, layers]`; NaN where none applies."""
    parts = []
    for part in np.array_split(found.samples[kind], segments):
        if segments == 1:
            known = [found.thresholds[kind][layer] for layer in found.layers]
            limits = np.array([np.nan if t is None else t for t in known])
        else:
            limits = np.percentile(part, found.percentile, axis=0)
        parts.append(np.where(np.isnan(part) | np.isnan(limits), np.nan, part > limits))
    return np.concatenate(parts)


def clipped_by_percentile(norms: np.ndarray, percentile: float, window: int = WINDOW):
    """What `PercentileClip` would clip of norms `[updates, layers]`."""
    hit = np.zeros(norms.shape)
    for i, row in enumerate(norms):
        hit[i] = row > np.percentile(norms[max(0, i - window + 1) : i + 1], percentile, axis=0)
    return hit


def steady(found_choices: list[Choice]) -> Choice:
    """The simplest of norm's three that clips at all times; else the percentile clipper."""
    by_name = {c.name: c for c in found_choices}
    for name in ("clip-norm.json", "clip-norm-schedule.json"):
        if name in by_name and by_name[name].fits:
            return by_name[name]
    return by_name["clip-percentile.json"]


def write_table(path: Path, found) -> None:
    """A row a layer: the spread of its norm, and the threshold of each clipper."""
    spread = {"norm_min": 0, "norm_p10": 10, "norm_median": 50, "norm_p90": 90, "norm_max": 100}
    columns = ("layer", *spread, *found.thresholds)
    rows = []
    for k, layer in enumerate(found.layers):
        norms = found.samples["norm"][:, k]
        values = {name: np.percentile(norms, q) for name, q in spread.items()}
        values |= {kind: of_layer[layer] for kind, of_layer in found.thresholds.items()}
        rows.append(
            {"layer": layer} | {n: "" if v is None else f"{v:.6g}" for n, v in values.items()}
        )

    write_csv(path, columns, rows)


def draw(path: Path, found, segments: int, title: str) -> None:
    """Each layer's spread of norms and its threshold; norms, and what is clipped, over the run."""
    from matplotlib.figure import Figure

    norms = found.samples["norm"]
    count = len(found.layers)
    figure = Figure(figsize=(13, max(6.5, min(2 + 0.11 * count, 26))), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[1.25, 1])
    layers = figure.add_subplot(grid[:, 0])
    at = np.arange(count)
    low, median, high = np.percentile(norms, (10, 50, 90), axis=0)
    layers.hlines(at, np.maximum(low, 1e-30), high, color="C0", alpha=0.5, label="10 to 90 %")
    layers.scatter(median, at, s=9, color="C0", label="median")
    limits = [found.thresholds["norm"][layer] or np.nan for layer in found.layers]
    label = f"threshold ({found.percentile:g}th percentile)"
    layers.scatter(limits, at, s=14, color="C3", marker="|", label=label)
    every = -(-count // 120)
    layers.set_yticks(at[::every], found.layers[::every], fontsize=6 if count > 40 else 9)
    layers.set(ylim=(count - 0.5, -0.5), xlabel="norm of the layer's gradient")
    layers.legend(loc="best", fontsize="small")

    over = figure.add_subplot(grid[0, 1])
    steps = np.arange(1, len(norms) + 1)
    alive = np.where(norms > 0, norms, np.nan)
    over.fill_between(
        steps, *np.nanpercentile(alive, (10, 90), axis=1), alpha=0.25, label="layers, 10 to 90 %"
    )
    over.plot(steps, np.nanmedian(alive, axis=1), lw=0.8, label="median layer")
    over.plot(steps, found.samples["global"], lw=0.8, color="black", label="all layers")
    over.set(ylabel="norm of the gradient", xlabel="update")
    over.legend(fontsize="small")
    layers.set_xscale("log")
    over.set_yscale("log")

    share = figure.add_subplot(grid[1, 1])
    lines = {"one threshold a layer": clipped(found, "norm", 1)}
    if segments > 1:
        lines[f"{segments} thresholds in a row"] = clipped(found, "norm", segments)
    lines[f"PercentileClip of the last {WINDOW}"] = clipped_by_percentile(norms, found.percentile)
    smooth = max(1, len(norms) // 40)
    for name, hit in lines.items():
        means = [100 * np.nanmean(hit[i : i + smooth]) for i in range(0, len(hit), smooth)]
        share.plot(steps[::smooth], means, label=name)
    share.axhspan(5, 15, color="grey", alpha=0.15)
    share.set(ylabel="layers clipped, % (grey: 5 to 15)", xlabel="update", ylim=(-3, 103))
    share.legend(fontsize="small")
    for axis in (layers, over, share):
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    replace_file(path, lambda scratch: figure.savefig(scratch, dpi=110))


def show(found, found_choices: list[Choice], segments: int, output: Path, command: str) -> None:
    """The tables on the terminal, and the command that trains with the result."""
    console = Console()
    left_out = f", {found.nonfinite} left out as not finite" if found.nonfinite else ""
    table = Table(
        title=f"thresholds: percentile {found.percentile:g} of {found.updates} updates{left_out}",
        caption=f"exponential: gamma at beta={found.beta:g}; all layers together: norm "
        f"{found.global_norm or 0:.3g} (--clipper norm --scope global --max-norm)",
    )
    table.add_column("layer", overflow="fold")
    for kind in found.thresholds:
        table.add_column(kind, justify="right")
    for layer in found.layers:
        values = (found.thresholds[kind][layer] for kind in found.thresholds)
        table.add_row(layer, *("–" if v is None else f"{v:.3g}" for v in values))
    console.print(table)

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
    console.print(table)
    constant = next((c for c in found_choices if c.name == "clip-norm.json"), None)
    even = steady(found_choices)
    if constant is not None and constant is not even:
        print(
            "The norms drift: one threshold a layer clips "
            f"{100 * constant.shares[0]:.0f} % of the first eighth of the run and "
            f"{100 * constant.shares[-1]:.0f} % of the last; {even.name} clips evenly."
        )
    if found.updates < LEAST:
        print(f"{found.updates} updates are few for a percentile: watch more (--steps, --epochs).")
    print(f"results in {output}; train with")
    for name in dict.fromkeys(c.name for c in (constant, even) if c is not None):
        print(f"  {command} --clip-config {output / name}")


# -------------------------------------------------------------------------------------- command


def watched_options(recipe, rest: list[str]) -> Options:
    """The recipe's options, unclipped unless `rest` names a clipper or a threshold."""
    parsed = opts.parse(recipe, rest)
    if clipping_options() & set(parsed.given):
        return parsed.options
    return opts.resolve(recipe, parsed.config, {**parsed.given, "clipper": "none"})


def clipping_options() -> set[str]:
    """The options that choose a clipper."""
    return opts.clipping_names()


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
    if path.exists() and watched.exists() and opts.read_json(path) != settings:
        raise RecipeError(
            f"{output} holds what was watched with other options: name another --output"
        )
    if watched.exists():
        print(f"using what was watched before: {watched}")
        found = load_watched(watched, percentile)
    else:
        found = watch(recipe, options, steps, output, percentile)
        output.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
        save_watched(watched, found)
    segments = parts_of(found, segments)
    found_choices = choices(found, segments, output)
    write_table(output / "calibration.csv", found)
    draw(output / "calibration.png", found, segments, f"{recipe.name}: gradients and thresholds")
    return found, found_choices


def training_command(name: str, rest: list[str]) -> str:
    """The command that trains the recipe with the same options, but for the clipper's."""
    recipe = find_recipe(name)
    given = {n: v for n, v in opts.parse(recipe, rest).given.items() if n not in clipping_options()}
    if "task" in recipe.settings:  # two recipes of one script
        given = {"task": recipe.settings["task"]} | given
    return shlex.join(["python", script_of(name), *opts.as_words(recipe, given)])


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, 2 for a mistake in the flags or a run that fails, 130 after Ctrl-C."""
    parser = Parser(prog="calibrate", description=__doc__)
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
