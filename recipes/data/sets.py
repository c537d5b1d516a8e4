"""A split of a data set, and a data set of three splits with its preprocessing."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

SMALL_SHUFFLE_BUFFER = 50_000  # examples of small encoded images: the whole set fits
LARGE_SHUFFLE_BUFFER = 8_192  # examples of encoded photographs, about 1 GB


@dataclasses.dataclass(frozen=True)
class Split:
    """One split in storage order.

    Attributes:
        dataset: a finite, unbatched `tf.data.Dataset` of elements of any structure, in the same
            order at each iteration, cheap to skip (images still encoded if possible).
        size: int, the number of elements.
    """

    dataset: tf.data.Dataset
    size: int


@dataclasses.dataclass(frozen=True)
class Data:
    """The data that a recipe trains on.

    Attributes:
        train, validation, test: `Split`.
        preprocess_train: `(element, seed) -> (x, y)`; `seed` is an int64 [2] tensor, unique to
            this example and epoch, for stateless random ops.
        preprocess_eval: `(element) -> (x, y)`.
        num_outputs: int, the number of classes or of predicted values.
        name: str, for tables and titles.
        shuffle_buffer: int, size of the shuffle buffer in examples.
        note: str, a description of the three splits if they are not the set's own.
        class_names: tuple of str, one per class; empty if not a classification.
        decoding: JSON-able keyword arguments to decode an image file for evaluation, as
            `recipes/predict.py` does.
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
    class_names: tuple[str, ...] = ()
    decoding: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def normalise(image: tf.Tensor) -> tf.Tensor:
    """Scales pixels 0..255 of any dtype to float32 in -1..1."""
    return tf.cast(image, tf.float32) / 127.5 - 1.0
