"""Deadband: predictions below a threshold become 0."""

import keras
import numpy as np
from keras import ops

_BEYOND = "beyond_dead_zone"


def fit_dead_zone(angles: np.ndarray, answers: np.ndarray) -> float:
    """The width of the dead zone that suits a log best.

    A driver at a keyboard steers in strokes and leaves the angle at exactly 0 in between, where a
    model that minimises a mean answers with a little of everything. The width is that of the least
    sum of absolute and squared error, each as a share of what it is without a dead zone.

    Args:
        angles: float [frames], of the log.
        answers: float [frames], of the model.

    Returns:
        The size of the largest answer that becomes 0, in the units of the log; 0 where every answer
        is better left as it is.
    """
    size = np.abs(answers)
    order = np.argsort(size)
    total = np.zeros(len(order))
    for now, then in (
        (np.abs(angles - answers), np.abs(angles)),
        ((angles - answers) ** 2, angles**2),
    ):
        if not now.any():
            return 0.0
        total += np.cumsum((then - now)[order]) / now.sum()
    best = int(np.argmin(total))
    return float(size[order[best]]) if total[best] < 0 else 0.0


def with_dead_zone(model: keras.Model, width: float) -> keras.Model:
    """The model with answers of up to `width` at 0, in layers of Keras alone.

    Args:
        model: functional, with one output [frames, 1].
        width: in the units of the log, 0 or more.

    Returns:
        A model that shares the weights. NaN stays NaN.
    """
    answer = model.outputs[0]
    beyond = keras.layers.Rescaling(1.0, offset=-width, dtype="float32", name=_BEYOND)
    inside = beyond(ops.abs(answer)) <= 0
    meant = ops.where(inside, ops.zeros_like(answer), answer)
    return keras.Model(model.input, meant, name=model.name)


def width_of(model: keras.Model) -> float | None:
    """The width that `with_dead_zone` was given; None where the model has no dead zone."""
    if any(layer.name == _BEYOND for layer in model.layers):
        return -float(model.get_layer(_BEYOND).offset)
    return None
