"""What a recipe does around `fit`: backups, the best model, telemetry, and a stop at NaN."""

import csv
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np

from recipes.training.options import replace_file

BACKUP = "backup.npz"
HISTORY = "history.csv"
LAYERS = "layers.csv"
BEST = "best.keras"
_LOSS_SCALE_SKIPS = 20  # from 2^15 down to 2^-5: no loss scale needs more


class NonFinite(Exception):
    """The loss or a weight is NaN or infinite.

    Attributes:
        step: int, zero-based step of the run at which it was seen.
    """

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step


def clipped_optimizer(model):
    """The optimizer that clips, from under a LossScaleOptimizer where there is one."""
    optimizer = model.optimizer
    while not hasattr(optimizer, "read_telemetry") and hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    return optimizer


def state_variables(model) -> list:
    """Every variable that the next step depends on or adds to, once each, in a fixed order.

    Weights, moving averages, the states of random layers, the optimizer's (with the clipper's
    and the loss scale), and the running metrics of the epoch.
    """
    seen, variables = set(), []
    for variable in [*model.variables, *model.optimizer.variables, *model.metrics_variables]:
        if id(variable) not in seen:
            seen.add(id(variable))
            variables.append(variable)
    return variables


def all_finite(model) -> bool:
    """Whether every trainable weight is a finite number."""
    return all(np.isfinite(keras.ops.convert_to_numpy(v)).all() for v in model.trainable_variables)


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

    def on_train_batch_end(self, batch, logs=None):
        """Counts down the first epoch."""
        self._seen += 1
        if self._seen == self.steps:
            self._cut = not self.model.stop_training
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        """Lets `fit` go on to the next epoch."""
        if self._cut:
            self.model.stop_training = False
            self._cut = False


class Backup(keras.callbacks.Callback):
    """Keeps one file from which the run goes on bit for bit, replaced as a whole.

    `keras.callbacks.BackupAndRestore` forgets the step within the epoch and the metrics so far,
    and a kill while it writes leaves half a file.

    Args:
        path: where the backup lives.
        every: int, steps between two backups; one more at the end of each epoch.
        steps_per_epoch: int.
        start_step: int, the run's step at which this `fit` starts.
        restored: the loaded backup, or None for a fresh run.
        elapsed: seconds spent before this process.
        writes: bool, False on a worker other than the chief: it takes part in reading alone.
    """

    def __init__(
        self,
        path,
        every,
        steps_per_epoch,
        start_step=0,
        restored=None,
        elapsed=0.0,
        writes=True,
    ):
        super().__init__()
        self.writes = writes
        self.path = Path(path)
        self.every = every
        self.steps_per_epoch = steps_per_epoch
        self.step = start_step
        self._restored = restored
        self._elapsed = elapsed
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Training time so far, earlier processes of the same run included."""
        return self._elapsed + time.monotonic() - self._started

    def on_epoch_begin(self, epoch, logs=None):
        """Restores; `fit` has just set the metrics back to zero, so this is the place."""
        if self._restored is not None:
            restore(self.model, self._restored)
            self._restored = None

    def on_train_batch_end(self, batch, logs=None):
        """Saves every so many steps."""
        self.step += 1
        if self.step % self.every == 0 and self.step % self.steps_per_epoch:
            self.save()

    def on_epoch_end(self, epoch, logs=None):
        """Saves at the end of the epoch, when its row of the history is written."""
        self.save()

    def save(self):
        """Writes the state of the model and the optimizer, and the step."""
        save_backup(self.path, self.model, self.step, self.seconds, self.writes)


def save_backup(path, model, step: int, seconds: float, writes: bool = True) -> None:
    """Writes all of `state_variables` and the step into one npz file.

    Several workers have to call it together: what every replica keeps for itself is read as the
    sum over all of them. Statistics that differ from worker to worker are averaged first, so that
    a run that goes on from the file is in the state of this one.
    """
    average_statistics(model)
    variables = state_variables(model)
    head = {"step": step, "seconds": seconds, "paths": [v.path for v in variables]}
    arrays = {f"v{i}": keras.ops.convert_to_numpy(v) for i, v in enumerate(variables)}
    if not writes:
        return

    def write(scratch):
        with open(scratch, "wb") as file:
            np.savez(file, head=np.array(json.dumps(head)), **arrays)

    replace_file(path, write)


def load_backup(path) -> dict:
    """The content of a backup: "step", "seconds", "paths", and "values", a list of arrays.

    Raises:
        ValueError: the file is not a backup.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            head = json.loads(str(file["head"]))
            head["values"] = [file[f"v{i}"] for i in range(len(head["paths"]))]
    except (KeyError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a backup of a recipe: {error}") from error
    return head


def restore(model, backup: dict) -> None:
    """Sets every variable of the model and its optimizer from `load_backup`.

    Raises:
        ValueError: the model is another one.
    """
    variables = state_variables(model)
    shapes = [tuple(v.shape) for v in variables]
    if shapes != [value.shape for value in backup["values"]]:
        raise ValueError(
            f"the backup holds {len(backup['values'])} variables, the model {len(variables)} or "
            "other shapes: it belongs to another network or optimizer"
        )
    for variable, value in zip(variables, backup["values"], strict=True):
        variable.assign(value)


def average_statistics(model) -> None:
    """Averages the moving statistics of batch normalisation over the workers, if there are several.

    Each replica has its own, of its part of every batch. Without this a worker would validate
    with others than the chief saves.
    """
    import tensorflow as tf

    strategy = model.distribute_strategy
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return
    names = ("moving_mean", "moving_variance")
    statistics = [v for v in model.non_trainable_variables if v.path.endswith(names)]
    if not statistics:
        return

    def here(variable):
        copies = strategy.experimental_local_results(variable.value)
        return tf.reshape(tf.add_n([tf.convert_to_tensor(c) for c in copies]) / len(copies), [-1])

    sizes = [math.prod(v.shape) for v in statistics]
    mean = strategy.reduce("MEAN", tf.concat([here(v) for v in statistics], axis=0), axis=None)
    for variable, value in zip(statistics, tf.split(mean, sizes), strict=True):
        variable.assign(tf.reshape(value, variable.shape))


class AverageStatistics(keras.callbacks.Callback):
    """Lets all workers validate with the same moving statistics: `average_statistics`."""

    def on_test_begin(self, logs=None):
        """Averages before each validation."""
        average_statistics(self.model)


class StopAtNonFinite(keras.callbacks.Callback):
    """Raises `NonFinite` at a NaN or infinite loss, or weight at the end of an epoch.

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

    def on_train_batch_end(self, batch, logs=None):
        """Looks at the running loss, which one bad batch turns."""
        if not self.skips and not math.isfinite((logs or {}).get("loss", 0.0)):
            raise NonFinite(self.step)
        self.step += 1

    def on_epoch_end(self, epoch, logs=None):
        """Looks at the weights, for an update after the last loss, and for updates at all."""
        if not all_finite(self.model) or self._all_skipped():
            raise NonFinite(self.step - 1)

    def _all_skipped(self) -> bool:
        seen = clipped_optimizer(self.model).read_telemetry()
        # A falling loss scale in float16 may skip a few in a row.
        tolerated = 0 if self.skips else _LOSS_SCALE_SKIPS
        return seen["updates"] == 0 and seen["skipped"] > tolerated


class TestScore(keras.callbacks.Callback):
    """Adds `test_<metric>` to each epoch's logs, for the rule that compares with the test set."""

    __test__ = False  # not a test, whatever pytest thinks of the name

    def __init__(self, batches, steps=None):
        super().__init__()
        self.batches = batches
        self.steps = steps

    def on_epoch_end(self, epoch, logs=None):
        """Evaluates on the test batches."""
        values = self.model.evaluate(self.batches, steps=self.steps, verbose=0, return_dict=True)
        logs.update({f"test_{name}": value for name, value in values.items()})


class Telemetry(keras.callbacks.Callback):
    """Writes what the clip did to each layer into `layers.csv`, a row per epoch and layer.

    Columns: epoch, layer, grad_norm (L2 before the clip, root mean square over the epoch's
    updates), clip_fraction. Adds the learning rate and, where `fit` did not, `grad_norm` and
    `clip_fraction` to the logs.

    Args:
        path: of the file.
        writes: bool, False on a worker other than the chief.
    """

    FIELDS = ("epoch", "layer", "grad_norm", "clip_fraction")

    def __init__(self, path, writes=True):
        super().__init__()
        self.path = Path(path)
        self.writes = writes

    def on_epoch_end(self, epoch, logs=None):
        """Appends the epoch's rows."""
        optimizer = clipped_optimizer(self.model)
        logs["learning_rate"] = float(keras.ops.convert_to_numpy(optimizer.learning_rate))
        if not hasattr(optimizer, "read_telemetry"):
            return
        seen = optimizer.read_telemetry()
        for name in ("grad_norm", "clip_fraction"):
            logs.setdefault(name, float(seen[name]))
        if seen.get("skipped"):
            logs["skipped"] = int(seen["skipped"])
        if not self.writes:
            return
        fresh = not self.path.exists()
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(self.FIELDS)
            for layer, norm, fraction in zip(
                seen["layers"], seen["layer_grad_norm"], seen["layer_clip_fraction"], strict=True
            ):
                writer.writerow((epoch, layer, f"{norm:.6g}", f"{fraction:.6g}"))


class SaveBest(keras.callbacks.Callback):
    """Saves a model when the rule says so; the file is replaced as a whole.

    Args:
        path: of the `.keras` file.
        model: the model to save, which shares the weights of the one in training.
        rule: `(logs, best) -> bool`, `best` being the logs at the last save, or None.
        best: logs of the last save of the run so far, or None.
    """

    def __init__(self, path, model, rule: Callable, best: dict | None = None):
        super().__init__()
        self.path = Path(path)
        self.exported = model
        self.rule = rule
        self.best = best

    def on_epoch_end(self, epoch, logs=None):
        """Saves, or leaves the file as it is."""
        if self.rule(logs, self.best):
            replace_file(self.path, self.exported.save)
            self.best = dict(logs)


def read_rows(path) -> list[dict]:
    """The rows of a CSV file with numbers as floats; [] where there is no file."""
    if not Path(path).exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(file)]


def keep_epochs_before(path, epoch: int) -> None:
    """Drops the rows of `epoch` and later, which a resumed run writes again."""
    path = Path(path)
    if not path.exists():
        return
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    whole = [row for row in rows[1:] if len(row) == len(rows[0]) and int(row[0]) < epoch]
    if not whole:
        path.unlink()
        return

    def write(scratch):
        with open(scratch, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([rows[0], *whole])

    replace_file(path, write)


def _number(text):
    try:
        return float(text)
    except (TypeError, ValueError):
        return text
