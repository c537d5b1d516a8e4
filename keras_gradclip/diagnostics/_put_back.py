"""Training on trial: afterwards a model is what it was before."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import keras
import numpy as np

from keras_gradclip._types import Model, Optimizer, Variable
from keras_gradclip.optimizer._hyperparameters import to_numpy
from keras_gradclip.optimizer.clipped_optimizer import ClippedOptimizer

# What is put back by value; other attributes are objects that belong to the user.
_PLAIN = (int, float, complex, bool, str, bytes, tuple, frozenset, type(None))


@contextlib.contextmanager
def everything_put_back(model: Model, optimizer: ClippedOptimizer) -> Iterator[None]:
    """Leave the model, its optimizers, metrics, plain attributes and random states as they were."""
    before = [(v, np.array(to_numpy(v))) for v in _variables(model, optimizer)]
    known = {id(v) for v, _ in before}
    attributes = {k: v for k, v in vars(model).items() if isinstance(v, _PLAIN)}
    history, watchers = getattr(model, "history", None), optimizer._watchers
    states = random.getstate(), np.random.get_state()
    model.train_function = None  # what is traced inside is not for outside, and the reverse
    try:
        yield
    finally:
        optimizer._watchers = watchers
        new = [v for v in _variables(model, optimizer) if id(v) not in known]
        if new:
            model.reset_metrics()  # metrics that were built on the way
        for variable, value in before:
            variable.assign(value)
        for name, plain in attributes.items():
            if vars(model).get(name) is not plain:
                setattr(model, name, plain)
        model.train_function = None
        model.history, model.stop_training = history, False
        random.setstate(states[0])
        np.random.set_state(states[1])


def _variables(model: Model, optimizer: ClippedOptimizer) -> list[Variable]:
    """Every variable that a training step may write, each once."""
    found = [*model.variables, *model.metrics_variables, *optimizer.variables]
    for other in _optimizers(model):
        found += other.variables
    found += [v for v in vars(model).values() if _is_plain_variable(v)]
    return list({id(v): v for v in found}.values())


def _optimizers(model: Model) -> list[Optimizer]:
    """The model's optimizer and all others among its attributes, in lists and dicts as well."""
    result: list[Optimizer] = [model.optimizer]
    for value in vars(model).values():
        leaves = list(value.values()) if isinstance(value, dict) else [value]
        leaves = list(value) if isinstance(value, (list, tuple)) else leaves
        result += [x for x in leaves if isinstance(x, keras.optimizers.Optimizer)]
    return list({id(x): x for x in result}.values())


def _is_plain_variable(value: object) -> bool:
    """Whether an attribute is a variable of the backend that Keras does not track."""
    if isinstance(value, keras.Variable):
        return True
    return hasattr(value, "assign") and hasattr(value, "numpy") and hasattr(value, "shape")
