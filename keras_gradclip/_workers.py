"""Callbacks of several workers that share one set of files, which only the chief writes."""

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

#: Keras's callbacks that write files, and the attribute with the file or folder.
_PLACES = (
    (keras.callbacks.ModelCheckpoint, "filepath"),
    (keras.callbacks.CSVLogger, "filename"),
    (keras.callbacks.TensorBoard, "log_dir"),
)
#: The `callbacks` argument of `fit`.
Callbacks: TypeAlias = (
    keras.callbacks.Callback | list[keras.callbacks.Callback] | keras.callbacks.CallbackList | None
)


@contextlib.contextmanager
def chief_writes(strategy: Strategy | None, callbacks: Callbacks) -> Iterator[Callbacks]:
    """Redirects the files of Keras's callbacks to a temporary folder on all workers but the chief.

    Yields the callbacks to run in this process. All workers run all callbacks, because saving a
    model may read a variable that each replica has for itself, which sums over the workers. Custom
    callbacks have to find the chief by themselves.
    """
    if not aggregation.spans_workers(strategy):
        yield callbacks
        return
    whole = callbacks if isinstance(callbacks, keras.callbacks.CallbackList) else None
    given = list(whole.callbacks if whole else keras.tree.flatten(callbacks or []))
    for callback in given:
        if isinstance(callback, keras.callbacks.BackupAndRestore):
            _check_backup(strategy, Path(callback.backup_dir))
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
                callback.set_model(callback.model)  # TensorBoard creates its folder there
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
    """A `BackupAndRestore` that restores the chief's backup and saves into `folder`."""
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


def _check_backup(strategy: Strategy, folder: Path) -> None:
    """Checks that all workers have a backup, or none: they would begin at different epochs."""
    found = folder.is_dir() and any(folder.iterdir())
    if len({*aggregation.gather_numbers(strategy, float(found))}) > 1:
        raise ValueError(
            f"BackupAndRestore: `backup_dir` {str(folder)!r} holds a backup "
            f"{'here' if found else 'elsewhere'} but not on every worker. Give a folder that all "
            "workers share, or remove the backup to start anew."
        )
