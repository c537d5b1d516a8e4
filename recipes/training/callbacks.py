"""Callbacks of `fit`: a stop at NaN, telemetry, the history, and whole epochs."""

import math
from pathlib import Path
from typing import Any

import keras

from keras_gradclip.files import PathLike, append_csv
from keras_gradclip.optimizer.clipped_optimizer import find
from recipes.errors import TrainingDiverged
from recipes.training.checkpoint import all_finite, average_statistics

_LOSS_SCALE_SKIPS = 20  # from 2^15 down to 2^-5: no loss scale needs more


def clipped_optimizer(model: Any) -> Any:
    """The optimizer that clips, from under a LossScaleOptimizer where there is one."""
    return find(model.optimizer)


class PartialEpoch(keras.callbacks.Callback):
    """Ends the first epoch of a resumed run after the steps that it still lacks.

    Keras fixes the steps of an epoch for a whole `fit`. `stop_training` ends an epoch early, and
    taking it back at the epoch's end, which Keras asks only afterwards, lets `fit` go on.

    Args:
        steps: int, steps that are left of the first epoch.
    """

    def __init__(self, steps: int):
        super().__init__()
        self.steps = steps
        self._seen = 0
        self._cut = False

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Counts down the first epoch."""
        self._seen += 1
        if self._seen == self.steps:
            self._cut = not self.model.stop_training
            self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Lets `fit` go on to the next epoch."""
        if self._cut:
            self.model.stop_training = False
            self._cut = False


class AverageStatistics(keras.callbacks.Callback):
    """Lets all workers validate with the same moving statistics: `average_statistics`."""

    def on_test_begin(self, logs: Any = None) -> None:
        """Averages before each validation."""
        average_statistics(self.model)


class StopAtNonFinite(keras.callbacks.Callback):
    """Raises `TrainingDiverged` at a NaN in loss or gradient, or weight at the end of an epoch.

    First in the list, so that nothing after it saves such a model.

    Args:
        start_step: int, the run's step at which this `fit` starts.
        skips: bool, the optimizer skips updates that are not finite: then a loss of NaN alone
            does no harm, and only the weights count.
    """

    def __init__(self, start_step: int = 0, skips: bool = False):
        super().__init__()
        self.step = start_step
        self.skips = skips
        self._epoch = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Remembers the epoch, for the message."""
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Looks at the running loss and gradient norm, which one bad batch turns."""
        logs = logs or {}
        if not self.skips:
            is_bad = not math.isfinite(logs.get("loss", 0.0))
            # A rectifier may hide a NaN from the loss. Before the first update the norm is NaN.
            if is_bad or (math.isnan(logs.get("grad_norm", 0.0)) and self._seen()["updates"]):
                raise self.diverged(self.step)
        self.step += 1

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Looks at the weights, for an update after the last loss, and for updates at all."""
        if not all_finite(self.model) or self._all_skipped():
            raise self.diverged(self.step - 1)

    def diverged(self, step: int) -> TrainingDiverged:
        """The error for a step; names the first gradient, in the model's order, with a NaN."""
        variable = clipped_optimizer(self.model).first_nonfinite_variable
        layer = None if variable is None else variable.rpartition("/")[0] or variable
        cause = f"first non-finite gradient: {variable!r}"
        if variable is None:
            cause = "the gradients were finite, the update was not: lower the learning rate"
        message = f"training diverged to NaN in epoch {self._epoch + 1}: step {step}, {cause}"
        return TrainingDiverged(message, step, layer)

    def _all_skipped(self) -> bool:
        seen = self._seen()
        # A falling loss scale in float16 may skip a few in a row.
        tolerated = 0 if self.skips else _LOSS_SCALE_SKIPS
        return seen["updates"] == 0 and seen["skipped"] > tolerated

    def _seen(self) -> dict[str, Any]:
        return clipped_optimizer(self.model).read_telemetry()


class TestScore(keras.callbacks.Callback):
    """Adds `test_<metric>` to each epoch's logs, for the rule that compares with the test set."""

    __test__ = False  # not a test, whatever pytest thinks of the name

    def __init__(self, batches: Any):
        super().__init__()
        self.batches = batches

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Evaluates on the test batches."""
        values = self.model.evaluate(self.batches, verbose=0, return_dict=True)
        logs.update({f"test_{name}": value for name, value in values.items()})


class Telemetry(keras.callbacks.Callback):
    """Writes what the clip did to each layer into `layers.csv`, a row per epoch and layer.

    Columns: epoch (from 1), layer, grad_norm (L2 before the clip, root mean square over the
    epoch's updates), clip_fraction. Adds the learning rate of the epoch's last update and, where
    `fit` did not, `grad_norm` and `clip_fraction` to the logs.

    Args:
        path: of the file.
        writes: bool, False on a worker other than the chief.
    """

    FIELDS = ("epoch", "layer", "grad_norm", "clip_fraction")

    def __init__(self, path: PathLike, writes: bool = True):
        super().__init__()
        self.path = Path(path)
        self.writes = writes

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Appends the epoch's rows."""
        optimizer = clipped_optimizer(self.model)
        logs["learning_rate"] = _last_learning_rate(optimizer.inner_optimizer)
        seen = optimizer.read_telemetry()
        for name in ("grad_norm", "clip_fraction"):
            logs.setdefault(name, float(seen[name]))
        if seen.get("skipped"):
            logs["skipped"] = int(seen["skipped"])
        if not self.writes:
            return
        figures = zip(
            seen["layers"], seen["layer_grad_norm"], seen["layer_clip_fraction"], strict=True
        )
        rows = [(epoch + 1, layer, f"{norm:.6g}", f"{share:.6g}") for layer, norm, share in figures]
        append_csv(self.path, self.FIELDS, rows)


def _last_learning_rate(optimizer: Any) -> float:
    """That of the last update; `optimizer.learning_rate` is the next one's, 0 at a cosine's end."""
    rate = optimizer.get_config()["learning_rate"]
    if isinstance(rate, dict):
        schedule = keras.optimizers.schedules.deserialize(rate)
        rate = schedule(keras.ops.maximum(optimizer.iterations - 1, 0))
    return float(keras.ops.convert_to_numpy(rate))


class History(keras.callbacks.CSVLogger):
    """Writes `history.csv`, a row an epoch; epochs count from 1, as in every table."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Appends the epoch's row."""
        super().on_epoch_end(epoch + 1, logs)
