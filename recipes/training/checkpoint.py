"""The files that survive a kill: the backup to resume from, and the best model so far."""

import dataclasses
import json
import math
import time
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_gradclip._compat import all_layers
from keras_gradclip.files import PathLike, replace_file


def state_variables(model: Any) -> list[Any]:
    """Every variable that the next step depends on or adds to, once each, in a fixed order.

    Weights, moving averages, the states of random layers, the optimizer's (with the clipper's
    and the loss scale), the running metrics of the epoch, and the states of stateful RNNs, which
    Keras tracks nowhere.
    """
    variables = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    states = keras.tree.flatten([getattr(layer, "states", None) for layer in all_layers(model)])
    variables += [state for state in states if isinstance(state, keras.Variable)]
    return list({id(variable): variable for variable in variables}.values())


def all_finite(model: Any) -> bool:
    """Whether every trainable weight is a finite number."""
    return all(np.isfinite(keras.ops.convert_to_numpy(v)).all() for v in model.trainable_variables)


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
        path: PathLike,
        every: int,
        steps_per_epoch: int,
        start_step: int = 0,
        restored: Mapping[str, Any] | None = None,
        elapsed: float = 0.0,
        writes: bool = True,
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

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Restores; `fit` has just set the metrics back to zero, so this is the place."""
        if self._restored is not None:
            restore(self.model, self._restored)
            self._restored = None

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Saves every so many steps."""
        self.step += 1
        if self.step % self.every == 0 and self.step % self.steps_per_epoch:
            self.save()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Saves at the end of the epoch, when its row of the history is written."""
        self.save()

    def save(self) -> None:
        """Writes the state of the model and the optimizer, and the step."""
        save_backup(self.path, self.model, self.step, self.seconds, self.writes)


def save_backup(path: PathLike, model: Any, step: int, seconds: float, writes: bool = True) -> None:
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

    def write(scratch: str) -> None:
        with open(scratch, "wb") as file:
            np.savez(file, head=np.array(json.dumps(head)), **arrays)

    replace_file(path, write)


# What NumPy and `zipfile` raise over a file that is cut, or another one.
_NO_BACKUP = (
    *(AttributeError, IsADirectoryError, EOFError, KeyError, NotImplementedError),
    *(TypeError, ValueError, zipfile.BadZipFile, zlib.error),
)


def load_backup(path: PathLike) -> dict[str, Any]:
    """The content of a backup: "step", "seconds", "paths", "values", a list of arrays; its "path".

    Raises:
        ValueError: the file is not a backup.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            head = json.loads(str(file["head"]))
            head["values"] = [file[f"v{i}"] for i in range(len(head["paths"]))]
            head |= {"step": int(head["step"]), "seconds": float(head["seconds"])}
            head["path"] = str(path)
    except _NO_BACKUP as error:
        raise ValueError(f"{path} is not a backup of a recipe: {error}") from error
    return head


def matched(model: Any, backup: Mapping[str, Any]) -> list[Any]:
    """The variables of the model and its optimizer, one a value of `load_backup`.

    Raises:
        ValueError: the model is another one.
    """
    variables = state_variables(model)
    shapes = [tuple(v.shape) for v in variables]
    if shapes != [value.shape for value in backup["values"]]:
        raise ValueError(
            f"{backup['path']} holds {len(backup['values'])} variables, the model "
            f"{len(variables)} or other shapes: it belongs to another network or optimizer"
        )
    return variables


def restore(model: Any, backup: Mapping[str, Any]) -> None:
    """Sets every variable of the model and its optimizer from `load_backup`.

    Raises:
        ValueError: the model is another one.
    """
    for variable, value in zip(matched(model, backup), backup["values"], strict=True):
        variable.assign(value)


def average_statistics(model: Any) -> None:
    """Averages the moving statistics of batch normalisation over the workers, if there are several.

    Each replica has its own, of its part of every batch. Without this a worker would validate
    with others than the chief saves.
    """
    strategy = model.distribute_strategy
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return
    names = ("moving_mean", "moving_variance")
    statistics = [v for v in model.non_trainable_variables if v.path.endswith(names)]
    if not statistics:
        return

    def mean_of_copies(variable: Any) -> Any:
        copies = strategy.experimental_local_results(variable.value)
        return tf.reshape(tf.add_n([tf.convert_to_tensor(c) for c in copies]) / len(copies), [-1])

    sizes = [math.prod(v.shape) for v in statistics]
    mean = strategy.reduce(
        "MEAN", tf.concat([mean_of_copies(v) for v in statistics], axis=0), axis=None
    )
    for variable, value in zip(statistics, tf.split(mean, sizes), strict=True):
        variable.assign(tf.reshape(value, variable.shape))


class SaveBest(keras.callbacks.Callback):
    """Saves a model when the rule says so; the file is replaced as a whole.

    Args:
        path: of the `.keras` file.
        model: the model to save, which shares the weights of the one in training.
        rule: `Selection`.
        best: logs of the last save of the run so far, or None.
    """

    def __init__(
        self,
        path: PathLike,
        model: Any,
        rule: "Selection",
        best: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.path = Path(path)
        self.exported = model
        self.rule = rule
        self.best = best

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Saves, or leaves the file as it is."""
        if self.rule.is_better(logs, self.best):
            replace_file(self.path, self.exported.save)
            self.best = dict(logs)


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which epoch's model is kept.

    Attributes:
        rule: "improve" (the metric got better), or "beats-test" (better than on the test split).
        monitor: the validation metric, with its `val_`.
        mode: "max" or "min".
    """

    rule: str
    monitor: str
    mode: str

    @property
    def needs(self) -> tuple[str, ...]:
        """The metrics that it looks at."""
        test = "test_" + self.monitor.removeprefix("val_")
        return (self.monitor, *([test] if self.rule == "beats-test" else ()))

    @property
    def sign(self) -> float:
        """What a score is multiplied with so that more is better."""
        return {"max": 1.0, "min": -1.0}[self.mode]

    def is_better(self, logs: Mapping[str, Any], best: Mapping[str, Any] | None) -> bool:
        """Whether the model of an epoch replaces the one that was kept before."""
        score = self.sign * logs[self.monitor]
        if not math.isfinite(score):
            return False
        if self.rule == "beats-test":
            return score > self.sign * logs["test_" + self.monitor.removeprefix("val_")]
        return best is None or score > self.sign * best[self.monitor]

    def kept(self, history: Sequence[Mapping[str, Any]]) -> int | None:
        """The place in the history of the epoch that was kept last; None where none was."""
        place = None
        for i, row in enumerate(history):
            if self.is_better(row, None if place is None else history[place]):
                place = i
        return place
