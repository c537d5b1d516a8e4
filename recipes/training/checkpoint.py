"""The backup of a run, and the step where the run begins."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_gradclip import aggregation
from keras_gradclip._compat import all_layers
from keras_gradclip.files import PathLike, replace_file
from recipes.errors import RecipeError, plain_errors
from recipes.training import folder as folders
from recipes.training.build import Setup
from recipes.words import counted


def state_variables(model: Any) -> list[Any]:
    """All variables that the next step reads or writes, without repeats, in a fixed order.

    Weights, moving averages, states of random layers, the optimizer's variables (with the
    clipper's and the loss scale), the epoch's running metrics, and the states of stateful RNNs,
    which Keras does not track.
    """
    variables = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    states = keras.tree.flatten([getattr(layer, "states", None) for layer in all_layers(model)])
    variables += [state for state in states if isinstance(state, keras.Variable)]
    return list({id(variable): variable for variable in variables}.values())


def all_finite(model: Any) -> bool:
    """Whether every trainable weight is a finite number."""
    return all(np.isfinite(keras.ops.convert_to_numpy(v)).all() for v in model.trainable_variables)


def save_backup(path: PathLike, model: Any, step: int, seconds: float, writes: bool = True) -> None:
    """Writes all of `state_variables` and the step into one npz file.

    Several workers must call it together, because per-replica values are read as their sum.
    Statistics that differ between workers are averaged first, so that a run resumed from the file
    has the same state as this one.
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


def load_backup(path: PathLike) -> dict[str, Any]:
    """The content of a backup: "path", "step", "seconds", "paths" and "values", a list of arrays.

    Raises:
        ValueError: the file is not a backup.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            head = json.loads(str(file["head"]))
            head["values"] = [file[f"v{i}"] for i in range(len(head["paths"]))]
            head |= {"step": int(head["step"]), "seconds": float(head["seconds"])}
            head["path"] = str(path)
    except Exception as error:  # NumPy and zipfile raise a dozen types for damaged files
        raise ValueError(f"{path} is not a backup of a recipe: {error}") from error
    return head


def check_fits(backup: Mapping[str, Any], model: Any) -> None:
    """Checks that the content of `load_backup` is of this model.

    Raises:
        ValueError: it belongs to a different network or optimizer.
    """
    shapes = [tuple(variable.shape) for variable in state_variables(model)]
    if shapes != [value.shape for value in backup["values"]]:
        raise ValueError(
            f"{backup['path']} holds {len(backup['values'])} variables, the model {len(shapes)} "
            "or other shapes: it belongs to another network or optimizer"
        )


def restore(model: Any, backup: Mapping[str, Any]) -> None:
    """Sets every variable of the model and its optimizer from `load_backup`."""
    for variable, value in zip(state_variables(model), backup["values"], strict=True):
        variable.assign(value)


def average_statistics(model: Any) -> None:
    """Averages the moving statistics of batch normalisation over several workers.

    Each replica has its own statistics, of its part of every batch. Without the average a worker
    would validate with other statistics than the chief saves.
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


Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Start:
    """The point where a run begins.

    Attributes:
        step: the number of steps done.
        seconds: the time spent by earlier processes.
        history, layers: the rows of `history.csv` and `layers.csv`; the run appends to them.
        backup: of an interrupted run, from `load_backup`; None for a new or finished one.
        finished: whether the run has a result and no backup.
    """

    step: int = 0
    seconds: float = 0.0
    history: Rows = dataclasses.field(default_factory=list)
    layers: Rows = dataclasses.field(default_factory=list)
    backup: Mapping[str, Any] | None = None
    finished: bool = False


def find_start(setup: Setup, folder: Path) -> Start:
    """The `Start` of the run in a folder; writes nothing.

    Args:
        setup: the run's `Setup`, its state created.
        folder: the run's folder.

    Raises:
        RecipeError: the backup or a table is damaged, belongs to a different network, or differs
            between workers.
    """
    start, options, steps = Start(), setup.options, setup.feed.steps
    backup, result = folder / folders.BACKUP, folder / folders.RESULT
    if options.resume and backup.exists():
        with plain_errors():
            content = load_backup(backup)
            check_fits(content, setup.model)
        done = content["step"] // steps
        if done > options.epochs and not result.exists():  # its end would delete the backup
            raise RecipeError(
                f"--epochs {options.epochs}: the run in {folder} has trained {done}: give as many "
                "or more"
            )
        rows = _tables(setup, folder, done)
        if len(rows[0]) < done:
            raise RecipeError(
                f"{folder / folders.HISTORY}: has {counted(len(rows[0]), 'row')} for the "
                f"{counted(done, 'epoch')} of {backup.name}: restore the file, or start a new run"
            )
        start = Start(content["step"], content["seconds"], *rows, content)
    elif options.resume and result.exists():
        rows = _tables(setup, folder, math.inf)
        if len(rows[0]) < options.epochs:
            raise RecipeError(
                f"--resume: the run in {folder} ended after {counted(len(rows[0]), 'epoch')}, "
                "and its backup is gone: start a new run with more --epochs (and --keep-backup, "
                "to go on after its end)"
            )
        seconds = folders.read_seconds(result)
        start = Start(options.epochs * steps, seconds, *rows, finished=True)
    if setup.cluster is not None:
        starts = {int(step) for step in aggregation.gather_numbers(setup.strategy, start.step)}
        if len(starts) > 1:
            raise RecipeError(
                f"--resume: {setup.cluster.name} would begin at step {start.step}, and others at "
                f"{sorted(starts - {start.step})}: {folder} must be on a disk that all workers "
                "share"
            )
    return start


def _tables(setup: Setup, folder: Path, epochs: float) -> tuple[Rows, Rows]:
    """The rows of `history.csv` and `layers.csv` up to an epoch; later ones are trained again."""
    needed = [setup.recipe.monitor]
    if setup.options.select_best == "beats-test":
        needed.append(setup.recipe.test_metric)
    return (
        folders.read_history(folder / folders.HISTORY, needed, epochs),
        folders.read_history(folder / folders.LAYERS, ("grad_norm", "clip_fraction"), epochs),
    )
