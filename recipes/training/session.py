"""The shared training module: a `Recipe` says what differs, `main` does the rest.

A recipe is a short file:

    RECIPE = Recipe(name="resnet50", network="resnet50", settings={"epochs": 8})
    if __name__ == "__main__":
        sys.exit(main(RECIPE))

`main` reads the command line and turns every foreseeable failure into one line; `run` is the same
for Python callers, who get a `Result` or an exception.
"""

import contextlib
import dataclasses
import faulthandler
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from recipes.errors import RecipeError, TrainingDiverged
from recipes.training import multiworker as workers
from recipes.training import options as opts
from recipes.training.quiet import import_tensorflow

RUNS = Path("runs")
# An interrupted run may be resumed with these changed: none of them alters a step.
_FREE_ON_RESUME = {"epochs", "backup_every", "tensorboard", "monitor", "worker_timeout"}
MONITOR = "monitor"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What differs from network to network.

    Attributes:
        name: str, also the folder under `runs/`.
        network: str, a name of `recipes.models.build`.
        description: str, the head of `--help`; usually the module's docstring.
        settings: values of any options (`recipes.training.options`): epochs, learning_rate ...
        network_options: options of `recipes.models.build`, such as batch_norm_momentum.
        build: None, or `(num_outputs, image_size, model_class, options) -> keras.Model` in place
            of `recipes.models.build`. `model_class(inputs, outputs)` makes the model.
        load_data: None, or `options -> recipes.data.Data` in place of `recipes.data.load`.
        loss: None (cross-entropy of class probabilities), or `options -> keras.losses.Loss`.
        metrics: None (accuracy), or `() -> list of keras.metrics.Metric`.
        monitor: the validation metric that chooses the best model, with its `val_`.
        mode: "max" or "min".
        report: None, or `Result -> list of (name, text)` rows for the closing table. Recipes that
            are not classifiers print no `Best accuracy` line.
        extra_options: `recipes.training.options.Option`s of this recipe alone.
    """

    name: str
    network: str = "resnet50"
    description: str = ""
    settings: Mapping[str, object] = dataclasses.field(default_factory=dict)
    network_options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    build: Callable | None = None
    load_data: Callable | None = None
    loss: Callable | None = None
    metrics: Callable | None = None
    monitor: str = "val_accuracy"
    mode: str = "max"
    report: Callable | None = None
    extra_options: tuple = ()

    def options(self, **values) -> opts.Options:
        """The recipe's options with `values` in place of its settings, checked.

        Raises:
            RecipeError: an unknown name or a value that cannot be.
        """
        return opts.resolve(self, {}, values)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run achieved.

    Attributes:
        recipe: str, its name.
        output: Path, the folder of the results.
        monitor: str, the metric that chose the best model.
        best: float, its value for the model that was kept (of the best epoch if none was).
        best_epoch: int, zero-based.
        kept: bool, whether `best.keras` was written.
        history: a dict per epoch, numbers as in `history.csv`.
        test: metrics of the kept model on the test split.
        parameters: int, of the network that was kept.
        clip_fraction: float, mean over the epochs, in 0..1; NaN without telemetry.
        seconds: float, from start to end, earlier processes of a resumed run included.
        data: the `recipes.data.Data`.
    """

    recipe: str
    output: Path
    monitor: str
    best: float
    best_epoch: int
    kept: bool
    history: Sequence[dict]
    test: Mapping[str, float]
    parameters: int
    clip_fraction: float
    seconds: float
    data: object


# -------------------------------------------------------------------------------- command line


def main(recipe: Recipe, argv: Sequence[str] | None = None) -> int:
    """Runs a recipe from the command line.

    Returns:
        The exit status: 0; 1 for a run that failed; 2 for a mistake in flags, config or data;
        130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    place: dict[str, Path] = {}
    try:
        options, folder = _open_run(recipe, opts.parse(recipe, argv))
        place["folder"] = folder
        result = run(recipe, options, folder)
        if result is not None:
            _print_result(recipe, result)
        return 0
    except KeyboardInterrupt:
        return _fail(f"interrupted{_how_to_resume(place)}", 130, argv)
    except TrainingDiverged as error:
        return _fail(f"{error}{_what_is_left(place)}", 1, argv)
    except workers.WorkerLost as error:
        return _fail(str(error), 1, argv)
    except RecipeError as error:
        return _fail(str(error), 2, argv)
    except OSError as error:
        text = f"{error.strerror or error}"
        name = f": {error.filename}" if error.filename else ""
        return _fail(f"{text}{name}{_how_to_resume(place)}", 1, argv)
    except Exception as error:
        if not _is_tensorflow_error(error):
            raise
        return _fail(f"{_tensorflow_line(error)}{_how_to_resume(place)}", 1, argv)


def _fail(message: str, status: int, argv: Sequence[str]) -> int:
    if "--traceback" in argv:
        import traceback

        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    return status


def _is_tensorflow_error(error: Exception) -> bool:
    if "tensorflow" not in sys.modules:
        return False
    import tensorflow as tf

    return isinstance(error, tf.errors.OpError)


def _tensorflow_line(error: Exception) -> str:
    """The line that says what happened, out of TensorFlow's report on its graph."""
    noise = ("Graph execution error", "Detected at node", "File ", "[[", "<stack traces", "(")
    lines = [line.strip() for line in str(error).splitlines()]
    telling = [line for line in lines if line and not line.startswith(noise)]
    return telling[-1] if telling else _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


def _how_to_resume(place: Mapping) -> str:
    folder = place.get("folder")
    if folder is None or not (folder / "config.json").exists():
        return ""
    program = sys.argv[0] if sys.argv[0].endswith(".py") else "the same command"
    start = f"python {shlex.quote(program)}" if program.endswith(".py") else program
    return f"; go on with: {start} --resume --output {shlex.quote(str(folder))}"


def _what_is_left(place: Mapping) -> str:
    best = place.get("folder", Path()) / "best.keras"
    return f"; the last good model is in {best}" if best.exists() else ""


def _print_result(recipe: Recipe, result: Result) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{recipe.name} on {result.data.name}", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    rows = [("parameters", f"{result.parameters:,}"), ("epochs", str(len(result.history)))]
    if recipe.monitor == "val_accuracy":
        epoch = result.best_epoch + 1
        rows.append(("best validation accuracy", f"{100 * result.best:.2f} % (epoch {epoch})"))
        if "accuracy" in result.test:
            rows.append(("its test accuracy", f"{100 * result.test['accuracy']:.2f} %"))
    if recipe.report:
        rows += recipe.report(result)
    if not math.isnan(result.clip_fraction):
        rows.append(("clipped", f"{100 * result.clip_fraction:.3g} % (mean over the epochs)"))
    if result.history and "grad_norm" in result.history[-1]:
        rows.append(("gradient norm, last epoch", f"{result.history[-1]['grad_norm']:.4g}"))
    rows.append(("results in", str(result.output)))
    if not result.kept:
        rows.append(("note", "no epoch met the rule --select-best: no best.keras"))
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if recipe.monitor == "val_accuracy":
        print(f"Best accuracy: {100 * result.best:.2f}%")
    print(f"Time taken: {result.seconds:.0f} seconds")


# ---------------------------------------------------------------------------- the output folder


def _open_run(recipe: Recipe, parsed: opts.Parsed) -> tuple[opts.Options, Path]:
    """The options and the folder of a new or resumed run.

    A new run in the default place takes the next free name (`runs/resnet50`,
    `runs/resnet50-2`, ...), so that nothing is overwritten. A folder named by `--output` must be
    empty or not exist. `--resume` takes the newest default folder, or that of `--output`.
    """
    options = parsed.options
    if options.resume:
        return _reopen(recipe, parsed)
    if options.strategy == "multiworker" and not workers.read_cluster().is_chief:
        # The chief looks whether the folder is free, makes it, and may have done so already.
        return options, Path(options.output or RUNS / recipe.name)
    if options.output:
        folder = Path(options.output)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RecipeError(
                f"--output {folder} is not an empty folder: name another, or go on with the run in "
                "it with --resume"
            )
    else:
        folder = RUNS / recipe.name
        number = 1
        while folder.exists():
            number += 1
            folder = RUNS / f"{recipe.name}-{number}"
    return options, folder


def _reopen(recipe: Recipe, parsed: opts.Parsed) -> tuple[opts.Options, Path]:
    folder = Path(parsed.options.output) if parsed.options.output else _newest(recipe)
    path = folder / "config.json"
    if not path.exists():
        raise RecipeError(f"--resume: no run in {folder} (it has no config.json)")
    saved = opts.read_config(path, recipe)
    given = {**parsed.config, **parsed.given}
    options = opts.resolve(recipe, saved, given)
    now = opts.saved_options(recipe, options)
    changed = sorted(
        name
        for name, value in now.items()
        if name != "recipe" and name not in _FREE_ON_RESUME and saved.get(name, value) != value
    )
    if changed:
        raise RecipeError(
            f"--resume: the run in {folder} was started with other values of "
            + ", ".join(f"{name} ({saved[name]!r}, now {now[name]!r})" for name in changed)
            + "; leave them out, or start a new run"
        )
    return options, folder


def _newest(recipe: Recipe) -> Path:
    def number(folder):
        tail = folder.name.removeprefix(recipe.name).removeprefix("-")
        return int(tail or 1) if not tail or tail.isdigit() else 0

    folders = [
        f for f in RUNS.glob(f"{recipe.name}*") if number(f) and (f / "config.json").exists()
    ]
    if not folders:
        raise RecipeError(f"--resume: no run of {recipe.name} in {RUNS}/; name it with --output")
    return max(folders, key=number)


# ------------------------------------------------------------------------------------- one run


def run(
    recipe: Recipe,
    options: opts.Options,
    folder: str | os.PathLike,
    callbacks: Sequence = (),
) -> Result | None:
    """Trains, and writes everything into `folder`.

    With `--strategy multiworker` every worker calls this. The chief writes and returns a `Result`,
    the others return None; all see `folder` where a run is resumed.

    Args:
        recipe: `Recipe`.
        options: from `recipe.options(...)`.
        folder: of the results; with `options.resume` the run in it goes on.
        callbacks: more Keras callbacks, run after the recipe's own.

    Raises:
        RecipeError: a clipper, data set or device that cannot be.
        TrainingDiverged: NaN; names the layer of the first non-finite gradient.
        WorkerLost: another worker died or hangs.
        OSError: a full disk, a folder that cannot be written.
    """
    started = time.monotonic()
    folder = Path(folder)

    def begin():
        if options.strategy != "multiworker" or workers.read_cluster().is_chief:
            folder.mkdir(parents=True, exist_ok=True)
            opts.write_json(folder / "config.json", opts.saved_options(recipe, options))
        if options.optimizer == "sgd" and options.momentum == 0:
            print(
                "warning: plain SGD; the authors of the method advise an adaptive optimizer "
                "such as adamw",
                file=sys.stderr,
            )

    with prepared(recipe, options, folder, begin, started) as trainer:
        return trainer.train(callbacks)


@contextlib.contextmanager
def prepared(
    recipe: Recipe,
    options: opts.Options,
    folder: Path,
    begin: Callable[[], None] = lambda: None,
    started: float | None = None,
) -> Iterator["_Trainer"]:
    """A run before its first step, for whoever wants its model and data without training.

    Args:
        recipe: `Recipe`.
        options: from `recipe.options(...)`.
        folder: where `train` would write.
        begin: called once the data are there, before the model is built.
        started: `time.monotonic()` at the run's start, or None for now.

    Yields:
        An object with `model` (compiled), `data`, `steps` (batches an epoch), `create_state()`
        and `stream(first_step)`, the endless batches. Valid inside the context alone.

    Raises:
        RecipeError: a clipper, data set or device that cannot be.
    """
    started = time.monotonic() if started is None else started
    import_tensorflow()
    import keras

    keras.backend.clear_session()
    if options.deterministic:
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()
    clipper = build_clipper(options)
    cluster = workers.read_cluster() if options.strategy == "multiworker" else None
    strategy = make_strategy(options, cluster)
    with _dtype_policy(options.mixed_precision), _named_losses(options, cluster):
        data = _load_data(recipe, options)
        begin()
        yield _Trainer(recipe, options, folder, data, clipper, strategy, started, cluster)


class _Trainer:
    """One run: what `run` would otherwise pass around."""

    def __init__(self, recipe, options, folder, data, clipper, strategy, started, cluster=None):
        import keras

        from recipes.data.sets import steps_per_epoch

        self.cluster = cluster
        self.writes = cluster is None or cluster.is_chief
        self.recipe, self.options, self.folder, self.data = recipe, options, folder, data
        self.strategy, self.started = strategy, started
        self.steps = steps_per_epoch(data.train, options.batch_size, options.limit_steps)
        self.sign = {"max": 1.0, "min": -1.0}[recipe.mode]
        scope = strategy.scope() if strategy else contextlib.nullcontext()
        # Now, and not only at the start: preparing data may have drawn random numbers.
        keras.utils.set_random_seed(options.seed)
        with scope, _plain_errors():
            self.model = build_model(recipe, options, data, clipper, self.steps)
            self.exported = _export(self.model)

    monitored: Path | None = None

    def train(self, extra_callbacks) -> Result | None:
        import keras

        from recipes.training import callbacks as cb

        restored = self._restored()
        start, elapsed = (restored["step"], restored["seconds"]) if restored else (0, 0.0)
        first_epoch, first_step = divmod(start, self.steps)
        self._check_start(start)
        if self.writes:
            for name in (cb.HISTORY, cb.LAYERS):
                cb.keep_epochs_before(self.folder / name, first_epoch)
        validation = self._shared_eval_batches(self.data.validation)
        self.create_state()
        backup = cb.Backup(
            self.folder / cb.BACKUP,
            self.options.backup_every,
            self.steps,
            start,
            restored,
            elapsed + time.monotonic() - self.started,
            self.writes,
        )
        if restored is None:
            # So that a failure in the first epoch has a state to go back to.
            cb.save_backup(backup.path, self.model, 0, backup.seconds, self.writes)
        if first_epoch < self.options.epochs:
            callbacks = keras.callbacks.CallbackList(
                [*self._callbacks(start, first_step, backup), *extra_callbacks],
                add_history=True,
                add_progbar=self._verbosity() > 0,
                verbose=self._verbosity(),
                epochs=self.options.epochs,
                steps=self.steps,
                model=self.model,
            )
            try:
                self.model.fit(
                    self._shared_stream(start),
                    initial_epoch=first_epoch,
                    epochs=self.options.epochs,
                    steps_per_epoch=self.steps,
                    validation_data=validation,
                    callbacks=callbacks,
                    shuffle=False,  # the stream is
                    verbose=self._verbosity(),
                )
            except cb.NonFinite as error:
                raise self._diverged(error.step) from None
        return self._result(backup.seconds) if self.writes else None

    def _check_start(self, start: int) -> None:
        """Whether all workers begin at the same step: each read the backup by itself."""
        if self.cluster is None:
            return
        from keras_gradclip import _aggregation as aggregation

        starts = {int(step) for step in aggregation.gather_numbers(self.strategy, start)}
        if len(starts) > 1:
            raise RecipeError(
                f"--resume: {self.cluster.name} would begin at step {start}, and others at "
                f"{sorted(starts - {start})}: {self.folder} must be on a disk that all workers "
                "share"
            )

    def _restored(self):
        from recipes.training import callbacks as cb

        path = self.folder / cb.BACKUP
        if not self.options.resume or not path.exists():
            return None
        try:
            return cb.load_backup(path)
        except ValueError as error:
            raise RecipeError(str(error)) from error

    def create_state(self):
        """Makes the variables of the optimizer and the metrics, before the first step does."""
        scope = self.strategy.scope() if self.strategy else contextlib.nullcontext()
        with scope, _plain_errors():
            self.model.optimizer.build(self.model.trainable_variables)
        self.model.evaluate(self._eval_batches(self.data.validation), steps=1, verbose=0)

    def stream(self, start):
        """Endless training batches, from global step `start` on."""
        from recipes.data.sets import train_stream

        return train_stream(
            self.data, self.options.batch_size, self.options.seed, start, self.steps
        )

    def _shared_stream(self, start):
        """The stream, of which each worker of several prepares its part alone."""
        from recipes.data.sets import train_stream

        batch, seed = self.options.batch_size, self.options.seed
        return self._shared(
            lambda part: train_stream(self.data, batch, seed, start, self.steps, part),
            lambda: self.stream(start),
        )

    def _shared_eval_batches(self, split):
        return self._shared(
            lambda part: self._eval_batches(split, part), lambda: self._eval_batches(split)
        )

    def _shared(self, make_part, make_whole):
        if self.cluster is None:
            return make_whole()
        from recipes.data.sets import Part

        def make(context):
            return make_part(
                Part(
                    context.input_pipeline_id,
                    context.num_input_pipelines,
                    context.num_replicas_in_sync,
                )
            )

        return self.strategy.distribute_datasets_from_function(make)

    def _eval_batches(self, split, *part):
        from recipes.data.sets import eval_batches

        batches = eval_batches(self.data, split, self.options.batch_size, *part)
        return batches.take(self.options.limit_steps) if self.options.limit_steps else batches

    def _verbosity(self) -> int:
        if not self.writes:
            return 0
        if self.options.verbose == "auto":
            return 1 if sys.stdout.isatty() else 2
        return {"quiet": 0, "bar": 1, "line": 2}[self.options.verbose]

    def _callbacks(self, start, first_step, backup) -> list:
        from recipes.training import callbacks as cb

        chain = [cb.StopAtNonFinite(start, skips=self.options.skip_nonfinite)]
        if first_step:
            chain.append(cb.PartialEpoch(self.steps - first_step))
        if self.options.select_best == "beats-test":
            chain.append(cb.TestScore(self._shared_eval_batches(self.data.test)))
        if self.cluster is not None:
            chain.append(cb.AverageStatistics())
        chain.append(cb.Telemetry(self.folder / cb.LAYERS, self.writes))
        if self.writes:
            chain += self._writers()
        if self.options.monitor:
            import keras_gradclip as kgc

            # A resumed run measures from there on, in a folder of its own.
            name = MONITOR if start == 0 else f"{MONITOR}-from-{start}"
            self.monitored = self.folder / name
            chain.append(kgc.ClipMonitor(self.monitored, every=self.options.monitor))
        return [*chain, backup]

    def _writers(self) -> list:
        """The callbacks that do nothing but write."""
        import keras

        from recipes.training import callbacks as cb

        best = self._best_row(cb.read_rows(self.folder / cb.HISTORY))[0]
        chain = [
            cb.SaveBest(self.folder / cb.BEST, self.exported, self._should_save, best),
            keras.callbacks.CSVLogger(self.folder / cb.HISTORY, append=True),
        ]
        if self.options.tensorboard:
            chain.append(
                keras.callbacks.TensorBoard(self.folder / "tensorboard", write_graph=False)
            )
        return chain

    def _should_save(self, logs, best) -> bool:
        """The rule of `--select-best`."""
        monitor = self.recipe.monitor
        value = self.sign * logs[monitor]
        if not math.isfinite(value):
            return False
        if self.options.select_best == "beats-test":
            return value > self.sign * logs["test_" + monitor.removeprefix("val_")]
        return best is None or value > self.sign * best[monitor]

    def _best_row(self, rows) -> tuple[dict | None, int]:
        """The logs at the last save according to the history, and the epoch; (None, -1)."""
        best, epoch = None, -1
        for row in rows:
            if self._should_save(row, best):
                best, epoch = row, int(row["epoch"])
        return best, epoch

    def _diverged(self, step) -> TrainingDiverged:
        from recipes.training import callbacks as cb
        from recipes.training.diagnose import replay

        backup = cb.load_backup(self.folder / cb.BACKUP)
        finding = replay(self.model, backup, self.stream(backup["step"]), step)
        epoch = finding.step // self.steps + 1
        return TrainingDiverged(
            f"training diverged to NaN in epoch {epoch}: {finding.message}",
            finding.step,
            finding.layer,
        )

    def _result(self, seconds) -> Result:
        from recipes.training import callbacks as cb
        from recipes.training import plots

        rows = cb.read_rows(self.folder / cb.HISTORY)
        metric = self.recipe.monitor.removeprefix("val_")
        plots.draw_from_files(self.folder, f"{self.recipe.name} on {self.data.name}", metric)
        if self.monitored is not None:
            import keras_gradclip as kgc

            print(f"Gradient report: {kgc.report(self.monitored)}")
        best, epoch = self._best_row(rows)
        kept = best is not None
        if not kept:
            best = max(rows, key=lambda row: self.sign * row[self.recipe.monitor])
            epoch = int(best["epoch"])
        fractions = [row["clip_fraction"] for row in rows if "clip_fraction" in row]
        test = self._test_kept() if kept else {}
        return Result(
            recipe=self.recipe.name,
            output=self.folder,
            monitor=self.recipe.monitor,
            best=best[self.recipe.monitor],
            best_epoch=epoch,
            kept=kept,
            history=rows,
            test=test,
            parameters=self.exported.count_params(),
            clip_fraction=sum(fractions) / len(fractions) if fractions else float("nan"),
            seconds=seconds,
            data=self.data,
        )

    def _test_kept(self) -> dict:
        """The kept model as a user would load it, on the test split."""
        import keras

        from recipes.training import callbacks as cb

        model = keras.models.load_model(self.folder / cb.BEST, compile=False)
        model.compile(
            loss=_loss(self.recipe, self.options), metrics=_metrics(self.recipe), jit_compile=False
        )
        return model.evaluate(self._eval_batches(self.data.test), verbose=0, return_dict=True)


# ------------------------------------------------------------------------------------ the parts


def build_clipper(options: opts.Options):
    """The clipper that the options ask for, or None.

    Raises:
        RecipeError: a threshold that cannot be, or a config that is not a clipper's.
    """
    import keras_gradclip as kgc
    from keras_gradclip.clippers import selectable

    with _plain_errors():
        if options.clip_config is not None:
            return kgc.get(options.clip_config)
        if options.clipper == "none":
            return None
        return selectable()[options.clipper](**options.clipping)


def build_model(recipe: Recipe, options: opts.Options, data, clipper, steps: int):
    """The compiled network, a `keras_gradclip.ClippedModel`; call it in the strategy's scope."""
    import keras_gradclip as kgc

    if recipe.build:
        model = recipe.build(data.num_outputs, options.image_size, kgc.ClippedModel, options)
    else:
        from recipes import models

        model = models.build(
            recipe.network,
            num_classes=data.num_outputs,
            image_size=options.image_size,
            model_class=kgc.ClippedModel,
            **recipe.network_options,
        )
    gate = None
    if options.activation_gate:
        extra = {"clip_value": options.gate_clip_value, "gamma": options.gate_gamma}
        gate = kgc.ActivationGate(
            initial_learning_rate=options.learning_rate,
            **{name: value for name, value in extra.items() if value is not None},
        )
    inner = build_optimizer(options, model, steps)
    optimizer = kgc.ClippedOptimizer(
        inner,
        clipper,
        gradient_accumulation_steps=options.accumulate if options.accumulate > 1 else None,
        skip_nonfinite=options.skip_nonfinite,
        telemetry=True,
    )
    model.compile(
        optimizer=optimizer,
        loss=_loss(recipe, options),
        metrics=_metrics(recipe),
        activation_gate=gate,
        jit_compile=options.jit,
    )
    return model


def build_optimizer(options: opts.Options, model, steps: int):
    """The inner optimizer: warm-up and cosine, no weight decay on biases and norms.

    Args:
        options: the run's options.
        model: its vectors (biases, gammas, betas) are excluded from weight decay.
        steps: int, batches an epoch.
    """
    import keras

    updates = max(1, options.epochs * steps // options.accumulate)
    warmup = min(round(options.warmup_epochs * steps / options.accumulate), updates - 1)
    schedule = keras.optimizers.schedules.CosineDecay(
        # Not from zero: the first update of a warm-up should move something.
        initial_learning_rate=options.learning_rate / (warmup + 1),
        decay_steps=max(1, updates - warmup),
        warmup_target=options.learning_rate if warmup else None,
        warmup_steps=warmup,
    )
    config: dict[str, object] = {"learning_rate": schedule}
    if options.weight_decay:
        config["weight_decay"] = options.weight_decay
    elif options.optimizer == "adamw":
        config["weight_decay"] = 0.0
    if options.optimizer == "sgd":
        config["momentum"] = options.momentum
    classes = {
        "adamw": keras.optimizers.AdamW,
        "adam": keras.optimizers.Adam,
        "sgd": keras.optimizers.SGD,
        "rmsprop": keras.optimizers.RMSprop,
        "lion": keras.optimizers.Lion,
        "adafactor": keras.optimizers.Adafactor,
        "nadam": keras.optimizers.Nadam,
    }
    optimizer = classes[options.optimizer](**config)
    if options.weight_decay:
        vectors = [v for v in model.trainable_variables if len(v.shape) < 2]
        optimizer.exclude_from_weight_decay(var_list=vectors)
    return optimizer


@contextlib.contextmanager
def _named_losses(options: opts.Options, cluster) -> Iterator[None]:
    """Turns TensorFlow's errors over a lost worker into one that names it."""
    try:
        yield
    except Exception as error:
        if cluster is None or not _is_tensorflow_error(error):
            raise
        lost = workers.lost(cluster, error, options.worker_timeout)
        if lost is None:
            raise
        raise lost from error


def make_strategy(options: opts.Options, cluster: workers.Cluster | None = None):
    """The tf.distribute strategy, or None for one device without one.

    Args:
        options: the run's options.
        cluster: the workers, with `--strategy multiworker`; comes back when all of them are there.

    Raises:
        RecipeError: too few devices, or a batch that they cannot share evenly.
    """
    import tensorflow as tf

    count = options.devices
    if cluster is not None:
        return _join(options, cluster)
    if options.batch_size % count:
        raise RecipeError(
            f"--batch-size {options.batch_size} is not divisible by --devices {count}"
        )
    if options.strategy == "none" and count > 1:
        raise RecipeError(f"--devices {count} needs --strategy mirrored, not none")
    if options.strategy == "none" or (options.strategy == "auto" and count == 1):
        return None
    if tf.config.list_physical_devices("GPU"):
        kind = "GPU"
    else:
        kind = "CPU"
        if count > 1:
            # Too late after TensorFlow has started: then what there is must do.
            with contextlib.suppress(RuntimeError):
                tf.config.set_logical_device_configuration(
                    tf.config.list_physical_devices("CPU")[0],
                    [tf.config.LogicalDeviceConfiguration()] * count,
                )
        if count > 1 and options.jit:
            raise RecipeError(
                "--jit does not work on several CPU devices (XLA cannot reach the weights of one "
                "from another): leave out --jit or --devices"
            )
    names = [device.name for device in tf.config.list_logical_devices(kind)]
    if len(names) < count:
        raise RecipeError(f"--devices {count}: there are {len(names)} {kind}s")
    # Between CPUs TensorFlow would use collective operations, which remember the size of their
    # group for the rest of the process; a search or a comparison runs more than one size.
    reduction = None if kind == "GPU" else tf.distribute.ReductionToOneDevice()
    return tf.distribute.MirroredStrategy(names[:count], cross_device_ops=reduction)


def _join(options: opts.Options, cluster: workers.Cluster):
    """The strategy over the workers of a cluster."""
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if options.devices > max(len(gpus), 1):
        raise RecipeError(
            f"--devices {options.devices}: {cluster.name} has {len(gpus)} GPUs"
            + ("" if gpus else ", and a worker without any counts as one device")
        )
    replicas = options.devices * len(cluster.tasks)
    if options.batch_size % replicas:
        raise RecipeError(
            f"--batch-size {options.batch_size} is not divisible by the {replicas} devices of "
            f"{len(cluster.tasks)} workers"
        )
    if options.jit and not gpus:
        raise RecipeError("--jit does not work on workers without a GPU: leave it out")
    workers.check_port(cluster)
    if gpus:
        tf.config.set_visible_devices(gpus[: options.devices], "GPU")
    workers.meet(cluster, options.worker_timeout)
    # Should one die just now, TensorFlow would wait and keep Python from running: this does not
    # need Python to end the process.
    faulthandler.dump_traceback_later(options.worker_timeout, exit=True, file=sys.__stderr__)
    try:
        return tf.distribute.MultiWorkerMirroredStrategy(
            communication_options=tf.distribute.experimental.CommunicationOptions(
                timeout_seconds=options.worker_timeout
            )
        )
    finally:
        faulthandler.cancel_dump_traceback_later()


def _load_data(recipe: Recipe, options: opts.Options):
    if recipe.load_data:
        return recipe.load_data(options)
    from recipes.data.sets import load

    return load(
        options.dataset,
        data_dir=options.data_dir,
        image_size=options.image_size,
        augment=options.augment,
        flip=options.flip,
        splits=options.splits,
        download=options.download,
        on_bad_data=options.on_bad_data,
    )


def _loss(recipe: Recipe, options: opts.Options):
    if recipe.loss:
        return recipe.loss(options)
    return cross_entropy(options.label_smoothing)


def cross_entropy(label_smoothing: float = 0.0):
    """Cross-entropy between integer labels [n] and class probabilities [n, classes].

    Args:
        label_smoothing: ε; the target becomes (1 − ε)·one-hot + ε/classes (Szegedy et al. 2016).
    """
    import keras

    if not label_smoothing:
        return keras.losses.SparseCategoricalCrossentropy()
    from recipes.training.losses import SmoothedCrossentropy

    return SmoothedCrossentropy(label_smoothing)


def _metrics(recipe: Recipe) -> list:
    import keras

    if recipe.metrics:
        return recipe.metrics()
    return [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]


def _export(model):
    """The network to keep: a plain `keras.Model` that shares the weights, main output alone.

    It loads without this package's training classes, and holds no optimizer.
    """
    import keras

    return keras.Model(model.inputs, model.outputs[0], name=model.name)


@contextlib.contextmanager
def _dtype_policy(mixed_precision: str) -> Iterator[None]:
    import keras

    before = keras.config.dtype_policy()
    if mixed_precision != "none":
        keras.config.set_dtype_policy(f"mixed_{mixed_precision}")
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """The ValueErrors and TypeErrors of libraries, raised over the user's values, in one line."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise RecipeError(_first_line(error)) from error
