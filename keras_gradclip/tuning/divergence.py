"""When a trial has diverged, and what it scores then."""

import math

import keras
import numpy as np

DIVERGED = "diverged"  # a metric: 1 for a trial that diverged
LARGEST_WEIGHT = 1e8


def worst_score(direction: str) -> float:
    """What a diverged trial scores: -inf to be maximised, +inf to be minimised."""
    return -math.inf if direction == "max" else math.inf


def exploded(model) -> bool:
    """Whether a trainable weight is not finite, or so large that no training led there.

    One step at a learning rate of 1e38 may leave weights of 1e37: finite, and with luck accurate.
    """
    weights = (keras.ops.convert_to_numpy(v) for v in model.trainable_variables)
    # Not "any > LARGEST": NaN is not larger than anything.
    return not all((np.abs(weight) <= LARGEST_WEIGHT).all() for weight in weights)
