"""Divergence of a trial: its test and its score."""

import math

import keras
import numpy as np

DIVERGED = "diverged"  # a metric: 1 for a trial that diverged
LARGEST_WEIGHT = 1e8


def worst_score(direction: str) -> float:
    """The score of a diverged trial: -inf for "max", +inf for "min"."""
    return -math.inf if direction == "max" else math.inf


def exploded(model: keras.Model) -> bool:
    """True if a trainable weight is not finite, or too large to be the result of training.

    One step at a learning rate of 1e38 may leave weights of 1e37: finite, and by luck accurate.
    """
    weights = (keras.ops.convert_to_numpy(v) for v in model.trainable_variables)
    # Not `any(> LARGEST)`, which is False for NaN.
    return not all((np.abs(weight) <= LARGEST_WEIGHT).all() for weight in weights)
