"""Callbacks of a run: stop at NaN, the files of an epoch, progress, backup."""

import functools
import math
import sys
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_gradclip as kgc
from keras_gradclip.files import replace_file
from keras_gradclip.optimizer.clipped_optimizer import find
from recipes.errors import TrainingDiverged
from recipes.training import checkpoint
from recipes.training.build import Setup
from recipes.training.checkpoint import Start
from recipes.training.evaluation import write_names
from recipes.training.folder import BACKUP, BEST, HISTORY, LAYERS, write_table

_LINE = "{:>9} {:>9} {:>11} {:>11} {:>9} {:>9} {:>8}"  # of an epoch
_LOSS_SCALE_SKIPS = 20  # from 2^15 down to 2^-5: no loss scale needs more


def chain(
    setup: Setup, start: Start, folder: Path, monitored: Path | None, started: float
) -> list[keras.callbacks.Callback]:
    """The callbacks of a run, in order.

    `monitored` is the folder of the `ClipMonitor`, or None; `started` is `time.monotonic()` at the
    start of this process.
    """
    options, feed = setup.options, setup.feed
    # First, so that nothing after it saves a model with a NaN.
    result: list[keras.callbacks.Callback] = [StopAtNonFinite(start.step, options.skip_nonfinite)]
    if options.select_best == "beats-test":
        score = functools.partial(_add_test_scores, setup.model, feed.evaluation(setup.data.test))
        result.append(keras.callbacks.LambdaCallback(on_epoch_end=score))
    if setup.cluster is not None:  # so that all workers validate with the same moving statistics
        average = functools.partial(checkpoint.average_statistics, setup.model)
        result.append(keras.callbacks.LambdaCallback(on_test_begin=lambda logs: average()))
    result.append(EpochFiles(folder, setup, start))
    if setup.writes and options.tensorboard:
        result.append(keras.callbacks.TensorBoard(folder / "tensorboard", write_graph=False))
    if setup.writes and options.verbose != "quiet":
        bar = options.verbose == "bar" or (options.verbose == "auto" and sys.stdout.isatty())
        metric, done = setup.recipe.monitor.removeprefix("val_"), start.step % feed.steps
        result.append(Progress(metric, done, bar))
    if monitored is not None:
        result.append(kgc.ClipMonitor(monitored, every=options.monitor))
    return [*result, Backup(folder / BACKUP, setup, start, started - start.seconds)]


def _add_test_scores(model: Any, batches: Any, epoch: int, logs: dict[str, Any]) -> None:
    """Adds `test_<metric>` to an epoch's logs, for `--select-best beats-test`."""
    values = model.evaluate(batches, verbose=0, return_dict=True)
    logs.update({f"test_{name}": value for name, value in values.items()})


class Backup(keras.callbacks.Callback):
    """Saves one file, replaced atomically, from which the run resumes bit for bit.

    `keras.callbacks.BackupAndRestore` loses the step within the epoch and the metrics so far, and
    a kill during its write leaves a partial file.

    The first epoch of a run resumed within an epoch has fewer steps, but Keras fixes the steps per
    epoch. `stop_training` ends that epoch, and is reset before Keras reads it to end `fit`.

    `started` is `time.monotonic()` at the run's start, less the seconds of earlier processes.
    """

    def __init__(self, path: Path, setup: Setup, start: Start, started: float):
        super().__init__()
        self.path = path
        self.setup = setup
        self.step = start.step
        self.steps = setup.feed.steps
        self.started = started
        self._restored = start.backup
        self._ends_early = False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Restores the backup here, because `fit` has just reset the metrics."""
        if self._restored is not None:
            checkpoint.restore(self.model, self._restored)
            self._restored = None
            if self.step % self.steps == 0:
                self.model.reset_metrics()  # the backup has the previous epoch's

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Saves every `backup_every` steps; ends the first epoch of a resumed run."""
        self.step += 1
        if self.step % self.steps == 0:
            if batch + 1 < self.steps and not self.model.stop_training:
                self._ends_early = self.model.stop_training = True
        elif self.step % self.setup.options.backup_every == 0:
            self._save()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Saves at the end of the epoch, after its row in the history."""
        if self._ends_early:
            self._ends_early = self.model.stop_training = False
        self._save()

    def _save(self) -> None:
        seconds = time.monotonic() - self.started
        checkpoint.save_backup(self.path, self.model, self.step, seconds, self.setup.writes)


class StopAtNonFinite(keras.callbacks.Callback):
    """Raises `TrainingDiverged` at a NaN in the loss or gradient, or in a weight at epoch end.

    Args:
        start_step: int, the run's step at which this `fit` starts.
        skips: bool, the optimizer skips non-finite updates: then a NaN loss does no harm, and
            only the weights are checked.
    """

    def __init__(self, start_step: int = 0, skips: bool = False):
        super().__init__()
        self.step = start_step
        self.skips = skips
        self._epoch = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Stores the epoch for the message."""
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Checks the running loss and gradient norm, which one bad batch makes NaN."""
        logs = logs or {}
        is_bad = not math.isfinite(logs.get("loss", 0.0))
        if not (is_bad or self.skips) and math.isnan(logs.get("grad_norm", 0.0)):
            # A ReLU may hide a NaN from the loss. Before the first update the norm is NaN, too.
            is_bad = _optimizer_of(self.model).read_telemetry()["updates"] > 0
        if is_bad and not self.skips:
            raise self.diverged(self.step)
        self.step += 1

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Checks the weights after the last update, and that not all updates were skipped."""
        if not checkpoint.all_finite(self.model) or self._all_skipped():
            raise self.diverged(self.step - 1)

    def diverged(self, step: int) -> TrainingDiverged:
        """The error for a step; names the first variable with a NaN gradient."""
        layer, cause = None, "the gradients were finite, the update was not: lower --learning-rate"
        if variable := _optimizer_of(self.model).first_nonfinite_variable:
            layer = variable.rpartition("/")[0] or variable
            cause = f"first non-finite gradient: {variable!r}"
        message = f"training diverged to NaN in epoch {self._epoch + 1}: step {step}, {cause}"
        return TrainingDiverged(message, step, layer)

    def _all_skipped(self) -> bool:
        seen = _optimizer_of(self.model).read_telemetry()
        # A falling loss scale in float16 may skip a few in a row.
        tolerated = 0 if self.skips else _LOSS_SCALE_SKIPS
        return seen["updates"] == 0 and seen["skipped"] > tolerated


class EpochFiles(keras.callbacks.Callback):
    """Writes the files of each epoch: two tables, and `best.keras` after the best one so far.

    `history.csv` has one row per epoch, `layers.csv` one per epoch and layer: epoch (from 1),
    layer, grad_norm (L2 before the clip, root mean square over the epoch's updates),
    clip_fraction. Adds the learning rate of the epoch's last update and, if `fit` did not,
    `grad_norm` and `clip_fraction` to the logs. Of several workers only the chief writes.
    """

    def __init__(self, folder: Path, setup: Setup, start: Start):
        super().__init__()
        self.folder = folder
        self.setup = setup
        self.history, self.layers = start.history, start.layers

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Appends the epoch's rows; saves `setup.exported` if the epoch is the best so far."""
        optimizer = _optimizer_of(self.model)
        logs["learning_rate"] = _last_learning_rate(optimizer.inner_optimizer)
        seen = optimizer.read_telemetry()
        for name in ("grad_norm", "clip_fraction"):
            logs.setdefault(name, float(seen[name]))
        if seen.get("skipped"):
            logs["skipped"] = int(seen["skipped"])
        number = {"epoch": float(epoch + 1)}
        figures = {n: float(value) for n, value in sorted(logs.items()) if np.ndim(value) == 0}
        self.history.append(number | figures)
        columns = (seen["layers"], seen["layer_grad_norm"], seen["layer_clip_fraction"])
        for layer, *values in zip(*columns, strict=True):
            norm, share = (float(f"{value:.6g}") for value in values)
            self.layers.append(
                {**number, "layer": layer, "grad_norm": norm, "clip_fraction": share}
            )
        if not self.setup.writes:
            return
        write_table(self.folder / HISTORY, self.history)
        write_table(self.folder / LAYERS, self.layers)
        kept = self.setup.recipe.kept_epoch(self.setup.options.select_best, self.history)
        if kept == len(self.history) - 1:
            write_names(self.folder / BEST, self.setup.data)
            replace_file(self.folder / BEST, self.setup.exported.save)


def _optimizer_of(model: Any) -> Any:
    """The ClippedOptimizer, unwrapped from a LossScaleOptimizer if there is one."""
    return find(model.optimizer)


def _last_learning_rate(optimizer: Any) -> float:
    """The last update's learning rate; `optimizer.learning_rate` is the next update's."""
    rate = optimizer.get_config()["learning_rate"]
    if isinstance(rate, dict):
        schedule = keras.optimizers.schedules.deserialize(rate)
        rate = schedule(keras.ops.maximum(optimizer.iterations - 1, 0))
    return float(keras.ops.convert_to_numpy(rate))


def percent(share: float) -> str:
    """A share of 0 to 1 as percent, in at most 9 characters; NaN as nothing."""
    if math.isnan(share):  # of an epoch without an update
        return ""
    return "<0.001 %" if 0 < share < 1e-5 else f"{100 * share:.3g} %"


class Progress(keras.callbacks.Callback):
    """Prints a progress bar during each epoch if `bar` is True, and one line at its end.

    Args:
        metric: the metric beside the loss.
        done: steps of the first epoch done by an earlier process.
        bar: whether to show the progress bar.
    """

    def __init__(self, metric: str, done: int = 0, bar: bool = False):
        super().__init__()
        self.metric = metric
        self.done = done
        self.bar = bar
        self._progress: keras.utils.Progbar | None = None
        self._started = time.monotonic()

    def on_train_begin(self, logs: Any = None) -> None:
        """Prints the header."""
        names = ("epoch", "loss", self.metric, "validation", "clipped", "rate", "seconds")
        print(_LINE.format(*names), flush=True)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Starts a progress bar."""
        self._started = time.monotonic()
        if self.bar:
            names, steps = ("loss", self.metric), self.params["steps"]
            self._progress = keras.utils.Progbar(steps, width=8, stateful_metrics=names)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Updates the progress bar."""
        if self._progress is not None:
            figures = [(n, logs[n]) for n in ("loss", self.metric) if n in (logs or {})]
            self._progress.update(self.done + batch + 1, figures, finalize=False)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Prints the epoch's line."""
        self.done = 0
        if self._progress is not None:
            print("\r" + " " * 79, end="\r")
        cells = (
            f"{epoch + 1}/{self.params['epochs']}",
            f"{logs['loss']:.4g}",
            f"{logs[self.metric]:.4f}",
            f"{logs['val_' + self.metric]:.4f}",
            percent(logs["clip_fraction"]),
            f"{logs['learning_rate']:.2g}",
            f"{time.monotonic() - self._started:.0f}",
        )
        print(_LINE.format(*cells), flush=True)
