"""Several workers, one set of files: callbacks write them on the chief alone."""

from __future__ import annotations

import contextlib
import copy
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import keras

from keras_gradclip import aggregation
from keras_gradclip._types import Strategy

# What each of Keras's callbacks writes, by the attribute that says where.
_PLACES = (
    (keras.callbacks.ModelCheckpoint, "filepath"),
    (keras.callbacks.CSVLogger, "filename"),
    (keras.callbacks.TensorBoard, "log_dir"),
)


#: What `fit` takes as `callbacks`.
Callbacks: TypeAlias = (
    keras.callbacks.Callback | list[keras.callbacks.Callback] | keras.callbacks.CallbackList | None
)


@contextlib.contextmanager
def chief_writes(strategy: Strategy | None, callbacks: Callbacks) -> Iterator[Callbacks]:
    """Lets Keras's callbacks write their files on the chief; elsewhere in a temporary folder.

    All workers run all callbacks: reading a variable that each replica keeps for itself sums it
    over the workers, and saving a model may read one. What the others write is removed at the
    end, as TensorFlow's guide to multi-worker training advises. A callback that is none of
    Keras's has to ask by itself whether it is the chief's.

    Args:
        strategy: the model's strategy, or None.
        callbacks: as `fit` takes them: None, a callback, a list, or a `CallbackList`.

    Yields:
        The callbacks that `fit` should run in this process.

    Raises:
        ValueError: BackupAndRestore found a backup on some of the workers.
    """
    if not aggregation.spans_workers(strategy):
        yield callbacks
        return
    whole = callbacks if isinstance(callbacks, keras.callbacks.CallbackList) else None
    given = list(whole.callbacks if whole else keras.tree.flatten(callbacks or []))
    _check_backups(strategy, given)
    if aggregation.is_chief(strategy) or not given:
        yield callbacks
        return
    scratch = Path(tempfile.mkdtemp(prefix="keras_gradclip-"))
    before: list[tuple[keras.callbacks.Callback, str, object]] = []
    try:
        own = []
        for i, callback in enumerate(given):
            folder = scratch / str(i)
            if isinstance(callback, keras.callbacks.BackupAndRestore):
                callback = _backup_elsewhere(callback, folder)
            for kind, name in _PLACES:
                if isinstance(callback, kind):
                    before.append((callback, name, getattr(callback, name)))
                    folder.mkdir()
                    setattr(callback, name, str(folder / Path(getattr(callback, name)).name))
            if whole and callback.model is not None:
                callback.set_model(callback.model)  # TensorBoard settles its folder there
            own.append(callback)
        if whole:
            whole.callbacks[:] = own
        yield callbacks if whole else own
    finally:
        for callback, name, value in before:
            setattr(callback, name, value)
        if whole:
            whole.callbacks[:] = given
        shutil.rmtree(scratch, ignore_errors=True)


def _backup_elsewhere(callback: keras.callbacks.Callback, folder: Path) -> keras.callbacks.Callback:
    """A `BackupAndRestore` that restores what the chief saved and saves into `folder`."""
    if Path(callback.backup_dir).is_dir():
        shutil.copytree(callback.backup_dir, folder)
    elsewhere = copy.copy(callback)
    keras.callbacks.BackupAndRestore.__init__(
        elsewhere,
        str(folder),
        save_freq=callback.save_freq,
        double_checkpoint=callback.double_checkpoint,
        delete_checkpoint=callback.delete_checkpoint,
    )
    if callback.model is not None:
        elsewhere.set_params(callback.params)
        elsewhere.set_model(callback.model)
    return elsewhere


def _check_backups(strategy: Strategy, callbacks: list[keras.callbacks.Callback]) -> None:
    """A backup that some workers see and others do not would start them at different epochs."""
    for callback in callbacks:
        if isinstance(callback, keras.callbacks.BackupAndRestore):
            found = Path(callback.backup_dir).is_dir() and any(Path(callback.backup_dir).iterdir())
            if len({*aggregation.gather_numbers(strategy, float(found))}) > 1:
                raise ValueError(
                    f"BackupAndRestore: `backup_dir` {str(callback.backup_dir)!r} holds a backup "
                    f"{'here' if found else 'elsewhere'} but not on every worker. Give a folder "
                    "that all workers share, or remove the backup to start anew."
                )
