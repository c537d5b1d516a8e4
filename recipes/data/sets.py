"""A split of a data set, and the three splits with what makes a batch of them."""

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf

from recipes.errors import DataError

# Beside the runs, out of version control; safe to delete.
DEFAULT_CACHE = Path(__file__).resolve().parents[2] / "runs" / "data"
SMALL_SHUFFLE_BUFFER = 50_000  # examples of small encoded images: the whole set fits
LARGE_SHUFFLE_BUFFER = 8_192  # examples of encoded photographs, about 1 GB


@dataclasses.dataclass(frozen=True)
class Split:
    """One split in storage order.

    Attributes:
        dataset: `tf.data.Dataset` of elements of any structure, finite, not batched, in the same
            order at each iteration, cheap to skip (still encoded where possible).
        size: int, the number of elements.
    """

    dataset: tf.data.Dataset
    size: int


@dataclasses.dataclass(frozen=True)
class Data:
    """What a recipe trains on.

    Attributes:
        train, validation, test: `Split`.
        preprocess_train: `(element, seed) -> (x, y)`; `seed` is an int64 [2] tensor, unique to
            this example and epoch, for stateless random ops.
        preprocess_eval: `(element) -> (x, y)`.
        num_outputs: int, classes of a classifier, or values predicted.
        name: str, for tables and file heads.
        shuffle_buffer: int, examples held to shuffle from.
        note: str, which parts the three splits are where the set itself has others.
    """

    train: Split
    validation: Split
    test: Split
    preprocess_train: Callable[..., Any]
    preprocess_eval: Callable[..., Any]
    num_outputs: int
    name: str
    shuffle_buffer: int = SMALL_SHUFFLE_BUFFER
    note: str = ""


def made_once(target: Path, make: Callable[[Path], object]) -> Path:
    """The folder `target`, which `make` fills on the first call, under its name but elsewhere.

    Several processes may call this at once: the first to finish moves its own into place.

    Raises:
        DataError: it cannot be written.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        make(scratch / target.name)
        with contextlib.suppress(OSError):  # another process was first
            os.rename(scratch / target.name, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if not target.is_dir():
        raise DataError(f"{target} cannot be written: free some space, or give --data-dir")
    return target


def normalise(image: tf.Tensor) -> tf.Tensor:
    """Pixels 0..255 of any dtype to float32 in -1..1, the same for every data set."""
    return tf.cast(image, tf.float32) / 127.5 - 1.0
