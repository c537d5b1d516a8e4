"""A split of a data set, and the three splits with what makes a batch of them."""

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
        class_names: tuple of str, one a class; empty where the outputs are no classes.
        decoding: keyword arguments with which an image file is read for evaluation, as
            `recipes/predict.py` does; JSON has to know them.
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
    """Pixels 0..255 of any dtype to float32 in -1..1, the same for every data set."""
    return tf.cast(image, tf.float32) / 127.5 - 1.0
