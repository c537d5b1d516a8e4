"""A run: data, model and devices are prepared, then it trains to its end."""

import contextlib
import dataclasses
import math
import os
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

import keras_gradclip as kgc
from keras_gradclip import aggregation
from keras_gradclip.files import replace_file, write_json
from recipes.data import Data
from recipes.errors import RecipeError, plain_errors
from recipes.models import inference_model
from recipes.training import callbacks as cb
from recipes.training import checkpoint, multiworker, plots, summary
from recipes.training import folder as folders
from recipes.training import options as opts
from recipes.training.build import (
    build_clipper,
    build_loss,
    build_metrics,
    build_model,
    load_data,
    warmup_updates,
)
from recipes.training.devices import device_kind, dtype_policy, make_strategy, named_losses
from recipes.training.feed import Feed
from recipes.training.option_table import Options
from recipes.training.recipe import Recipe, Result
from recipes.words import counted


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
        started: `time.monotonic()` when the user's waiting began; None for now.

    Raises:
        RecipeError: a clipper, data set or device that cannot be, or a folder that is in use.
        TrainingDiverged: NaN; names the layer of the first non-finite gradient.
        WorkerLost: another worker died or hangs.
        OSError: a full disk, a folder that cannot be written.
    """
    started = time.monotonic() if started is None else started
    folder = Path(folder)
    writes = options.strategy != "multiworker" or multiworker.read_cluster().is_chief
    with (
        folders.claimed(folder, options.resume) if writes else contextlib.nullcontext(),
        prepared(recipe, options, folder, started) as session,
    ):
        for line in summary.warnings(options):
            print(f"warning: {line}", file=sys.stderr)
        return session.train(callbacks)


@contextlib.contextmanager
def prepared(
    recipe: Recipe,
    options: Options,
    folder: Path,
    started: float | None = None,
) -> Iterator["Session"]:
    """A run before its first step, for whoever wants its model and data without training.

    Args:
        recipe: `Recipe`.
        options: from `recipe.options(...)`.
        folder: where `train` would write.
        started: `time.monotonic()` at the run's start, or None for now.

    Yields:
        An object with `model` (compiled), `data`, `steps` (batches an epoch), `create_state()`
        and `stream(first_step)`, the endless batches. Valid inside the context alone.

    Raises:
        RecipeError: a clipper, data set or device that cannot be.
    """
    started = time.monotonic() if started is None else started
    keras.backend.clear_session()
    if options.deterministic:
        tf.config.experimental.enable_op_determinism()
    clipper = build_clipper(options)
    cluster = multiworker.read_cluster() if options.strategy == "multiworker" else None
    strategy = make_strategy(options, cluster)
    with dtype_policy(options.mixed_precision), named_losses(options, cluster):
        data = load_data(recipe, options)
        yield Session(recipe, options, folder, data, clipper, strategy, started, cluster)


class Session:
    """One run: its model, its data, and the way from the first step to the result."""

    def __init__(
        self,
        recipe: Recipe,
        options: Options,
        folder: Path,
        data: Data,
        clipper: Any,
        strategy: Any,
        started: float,
        cluster: multiworker.Cluster | None = None,
    ):
        self.cluster = cluster
        self.writes = cluster is None or cluster.is_chief
        self.recipe, self.options, self.folder, self.data = recipe, options, folder, data
        self.clipper, self.strategy, self.started = clipper, strategy, started
        self.feed = Feed(data, options, strategy if cluster else None)
        self.steps = self.feed.steps
        self.selection = checkpoint.Selection(options.select_best, recipe.monitor, recipe.mode)
        self.monitor_folder: Path | None = None
        # Now, and not only at the start: preparing data may have drawn random numbers.
        keras.utils.set_random_seed(options.seed)
        with self._scope(), plain_errors():
            self.model = build_model(recipe, options, data, clipper, self.steps)
            # What is kept: it loads without this package, and holds no optimizer.
            self.exported = inference_model(self.model)

    def _scope(self) -> Any:
        return self.strategy.scope() if self.strategy else contextlib.nullcontext()

    # --------------------------------------------------------------------------------- training

    def train(self, extra_callbacks: Sequence[Any] = ()) -> Result | None:
        """Trains from the start or from the backup to the end; the result, on the chief."""
        resume = self.options.resume
        restored = self._restored() if resume else None
        finished = resume and restored is None and (self.folder / folders.RESULT).exists()
        if resume:
            folders.check_tables(self.folder, self.selection.needs)
        start, elapsed = (restored["step"], restored["seconds"]) if restored else (0, 0.0)
        if finished:
            start, elapsed = self._end_of_finished_run()
        first_epoch, first_step = divmod(start, self.steps)
        self._check_start(start)
        self._announce(start)
        validation = self.feed.shared(self.feed.evaluation, self.data.validation)
        self.create_state()
        if restored is not None:
            with plain_errors():
                checkpoint.matched(self.model, restored)
        if self.writes and not finished:
            options = opts.saved_options(self.recipe, self.options)
            write_json(self.folder / folders.CONFIG, options)
            for name in (folders.HISTORY, folders.LAYERS):
                folders.keep_epochs(self.folder / name, first_epoch)
        backup = checkpoint.Backup(
            self.folder / folders.BACKUP,
            self.options.backup_every,
            self.steps,
            start,
            restored,
            elapsed + time.monotonic() - self.started,
            self.writes,
        )
        if first_epoch < self.options.epochs:
            chain = [*self._callbacks(start, first_step, backup), *extra_callbacks]
            self._fit(chain, start, first_epoch, validation)
        if not self.writes:
            return None
        result = self._result()
        seconds = elapsed if finished else elapsed + time.monotonic() - self.started
        result = dataclasses.replace(result, seconds=seconds)
        if backup.step >= self.options.epochs * self.steps:
            write_json(self.folder / folders.RESULT, _summary(result))
            if not self.options.keep_backup:
                backup.path.unlink(missing_ok=True)
        return result

    def _fit(self, chain: list[Any], start: int, first_epoch: int, validation: Any) -> None:
        verbosity = self._verbosity()
        callbacks = keras.callbacks.CallbackList(
            chain,
            add_history=True,
            add_progbar=verbosity > 0,
            verbose=verbosity,
            epochs=self.options.epochs,
            steps=self.steps,
            model=self.model,
        )
        self.model.fit(
            self.feed.shared(self.feed.training, start),
            initial_epoch=first_epoch,
            epochs=self.options.epochs,
            steps_per_epoch=self.steps,
            validation_data=validation,
            callbacks=callbacks,
            shuffle=False,  # the stream is
            verbose=verbosity,
        )

    def _announce(self, start: int) -> None:
        if not self.writes or self.options.verbose == "quiet":
            return
        print("\n".join(_opening_lines(self, start)), flush=True)

    def _check_start(self, start: int) -> None:
        """Whether all workers begin at the same step: each read the backup by itself."""
        if self.cluster is None:
            return
        starts = {int(step) for step in aggregation.gather_numbers(self.strategy, start)}
        if len(starts) > 1:
            raise RecipeError(
                f"--resume: {self.cluster.name} would begin at step {start}, and others at "
                f"{sorted(starts - {start})}: {self.folder} must be on a disk that all workers "
                "share"
            )

    def _restored(self) -> dict[str, Any] | None:
        path = self.folder / folders.BACKUP
        if not path.exists():
            return None
        with plain_errors():
            return checkpoint.load_backup(path)

    def _end_of_finished_run(self) -> tuple[int, float]:
        """The steps and seconds of a run that ended and whose backup is gone."""
        rows = folders.read_history(self.folder / folders.HISTORY)
        if len(rows) < self.options.epochs:
            raise RecipeError(
                f"--resume: the run in {self.folder} ended after {counted(len(rows), 'epoch')}, "
                "and its backup is gone: start a new run with more --epochs (and --keep-backup, "
                "to go on after its end)"
            )
        return self.options.epochs * self.steps, folders.read_seconds(self.folder / folders.RESULT)

    def _verbosity(self) -> int:
        if not self.writes:
            return 0
        if self.options.verbose == "auto":
            return 1 if sys.stdout.isatty() else 2
        return {"quiet": 0, "bar": 1, "line": 2}[self.options.verbose]

    def create_state(self) -> None:
        """Makes the variables of the optimizer and the metrics, before the first step does."""
        with self._scope(), plain_errors():
            self.model.optimizer.build(self.model.trainable_variables)
        self.model.evaluate(self.feed.evaluation(self.data.validation), steps=1, verbose=0)

    def stream(self, start: int) -> tf.data.Dataset:
        """Endless training batches, from global step `start` on."""
        return self.feed.training(start)

    # -------------------------------------------------------------------------------- callbacks

    def _callbacks(self, start: int, first_step: int, backup: checkpoint.Backup) -> list[Any]:
        chain: list[Any] = [cb.StopAtNonFinite(start, skips=self.options.skip_nonfinite)]
        if first_step:
            chain.append(cb.PartialEpoch(self.steps - first_step))
        if self.options.select_best == "beats-test":
            chain.append(cb.TestScore(self.feed.shared(self.feed.evaluation, self.data.test)))
        if self.cluster is not None:
            chain.append(cb.AverageStatistics())
        chain.append(cb.Telemetry(self.folder / folders.LAYERS, self.writes))
        if self.writes:
            chain += self._writers()
        if self.options.monitor:
            # A resumed run measures from there on, in a folder of its own.
            name = folders.MONITOR if start == 0 else f"{folders.MONITOR}-from-{start}"
            self.monitor_folder = self.folder / name
            chain.append(kgc.ClipMonitor(self.monitor_folder, every=self.options.monitor))
        return [*chain, backup]

    def _writers(self) -> list[Any]:
        """The callbacks that do nothing but write."""
        rows = folders.read_history(self.folder / folders.HISTORY)
        kept = self.selection.kept(rows)
        best = None if kept is None else rows[kept]
        chain = [
            checkpoint.SaveBest(self.folder / folders.BEST, self.exported, self.selection, best),
            cb.History(self.folder / folders.HISTORY, append=True),
        ]
        if self.options.tensorboard:
            chain.append(
                keras.callbacks.TensorBoard(self.folder / "tensorboard", write_graph=False)
            )
        return chain

    # ---------------------------------------------------------------------------------- endings

    def _result(self) -> Result:
        rows = folders.read_history(self.folder / folders.HISTORY)
        metric = self.recipe.monitor.removeprefix("val_")
        plots.draw_from_files(self.folder, f"{self.recipe.name} on {self.data.name}", metric)
        if self.monitor_folder is not None:
            print(f"Gradient report: {kgc.report(self.monitor_folder)}")
        kept, sign = self.selection.kept(rows), self.selection.sign
        place = kept
        if place is None:
            place = max(range(len(rows)), key=lambda i: sign * rows[i][self.recipe.monitor])
        fractions = [row["clip_fraction"] for row in rows if "clip_fraction" in row]
        return Result(
            recipe=self.recipe.name,
            output=self.folder,
            monitor=self.recipe.monitor,
            best=rows[place][self.recipe.monitor],
            best_epoch=place,
            kept=kept is not None,
            history=rows,
            test={} if kept is None else self._test_kept(),
            parameters=self.exported.count_params(),
            clip_fraction=sum(fractions) / len(fractions) if fractions else float("nan"),
            seconds=0.0,
            data=self.data,
        )

    def _test_kept(self) -> dict[str, float]:
        """The kept model as a user would load it, on the test split."""
        path = self.folder / folders.BEST
        model = _finished(path, self.recipe, self.data, self.options)
        model.compile(
            loss=build_loss(self.recipe, self.options),
            metrics=build_metrics(self.recipe),
            jit_compile=False,
        )
        return model.evaluate(self.feed.evaluation(self.data.test), verbose=0, return_dict=True)


def _finished(path: Path, recipe: Recipe, data: Data, options: Options) -> keras.Model:
    """The best model after the recipe's `finish`, which may change it; saved again if so."""
    kept = keras.models.load_model(path, compile=False)
    if recipe.finish is None:
        return kept
    model = recipe.finish(kept, data, options)
    if model is not kept:
        replace_file(path, model.save)
    return model


def _opening_lines(run: Session, start: int) -> list[str]:
    """A few lines: folder, network, clipper, data, devices, precision, what is resumed.

    Args:
        run: that begins.
        start: int, steps that are done already.
    """
    options, data, clipper, steps = run.options, run.data, run.clipper, run.steps
    replicas = run.strategy.num_replicas_in_sync if run.strategy else 1
    warmup = warmup_updates(options, steps)
    clip = "no clipping" if clipper is None else textwrap.shorten(repr(clipper), 160)
    gate = ", activation gate" if options.activation_gate else ""
    kind = device_kind() + ("s" if replicas > 1 else "")
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


def _summary(result: Result) -> dict[str, object]:
    """What `result.json` holds."""
    return {
        "recipe": result.recipe,
        "monitor": result.monitor,
        "best": result.best,
        "best_epoch": result.best_epoch + 1,
        "epochs": len(result.history),
        "test": dict(result.test),
        "parameters": result.parameters,
        "clip_fraction": None if math.isnan(result.clip_fraction) else result.clip_fraction,
        "seconds": round(result.seconds, 1),
    }
