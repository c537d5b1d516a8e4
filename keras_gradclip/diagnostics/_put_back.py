"""A context that restores a model and all random states after a trial training.

Restored are what `keras.utils.set_random_seed` sets and, of the model, its optimizers and every
Keras object inside them: variables (tracked by Keras or not), the states of random generators, and
attributes that are numbers, strings or tensors.
"""

from __future__ import annotations

import contextlib
import functools
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeGuard

import keras
import numpy as np

from keras_gradclip import _compat, aggregation
from keras_gradclip.optimizer.clipped_optimizer import ClippedOptimizer

#: Types of attributes that are restored by value; other objects belong to the user.
_PLAIN = (int, float, complex, bool, str, bytes, tuple, frozenset, type(None), np.generic)
_KERAS = (
    *(keras.Layer, keras.optimizers.Optimizer, keras.metrics.Metric, keras.losses.Loss),
    keras.random.SeedGenerator,
)


@contextlib.contextmanager
def everything_put_back(
    model: keras.Model, optimizers: Sequence[ClippedOptimizer]
) -> Iterator[None]:
    """Restores a model, its optimizers and metrics, and all random states when the context ends."""
    with contextlib.ExitStack() as stack:
        _put_back_random_states(stack)
        parts = parts_of([model, *optimizers])
        known = {id(part) for part in parts}
        restores = [restore for part in parts for restore in _restores(part)]
        history = getattr(model, "history", None)
        model.train_function = None  # inside and outside must not share a traced function
        try:
            yield
        finally:
            now = parts_of([model, *optimizers])
            if any(id(part) not in known for part in now if _is_variable(part)):
                model.reset_metrics()  # metrics that were built inside
            for restore in restores:
                restore()
            model.train_function = None
            model.history = history


def parts_of(roots: Sequence[object]) -> list[object]:
    """The objects inside Keras objects, at any depth, and those objects themselves; each once.

    `model.variables` lacks the states of stateful RNNs and whatever else Keras does not track.
    """
    parts: dict[int, object] = {}
    stack: list[object] = [*reversed(roots)]
    while stack:
        part = stack.pop()
        if id(part) in parts:
            continue
        parts[id(part)] = part
        if isinstance(part, _KERAS):
            stack += [*vars(part).values(), *getattr(part, "variables", ())]
            if hasattr(part, "buffers"):  # buffers of PyTorch modules
                stack += part.buffers()
        elif isinstance(part, Mapping):
            stack += part.values()
        elif isinstance(part, (list, tuple, set, frozenset)):
            stack += part
        elif hasattr(part, "make_seeds"):  # a tf.random.Generator
            stack.append(getattr(part, "state", None))
    return list(parts.values())


def _restores(part: object) -> Iterator[Callable[[], object]]:
    """Functions that restore the present state of an object."""
    if _is_variable(part):
        for copy in _copies(part):
            yield _assigning(copy, np.array(aggregation.to_numpy(copy)))
    elif isinstance(part, _KERAS):
        yield _attributes_of(part)
    elif isinstance(part, np.random.Generator):
        generator, numbers = part.bit_generator, part.bit_generator.state
        yield lambda: setattr(generator, "state", numbers)
    else:
        for get, put in (("getstate", "setstate"), ("get_state", "set_state")):  # Python; others
            if callable(getattr(part, get, None)) and callable(getattr(part, put, None)):
                yield functools.partial(getattr(part, put), getattr(part, get)())


# Variables and attributes ------------------------------------------------------------------------


def _is_variable(part: object) -> TypeGuard[keras.Variable]:
    """True for a variable of Keras or the backend, or a tensor that is modified in place."""
    if isinstance(part, keras.Variable) or hasattr(part, "copy_"):
        return True
    return hasattr(part, "assign") and hasattr(part, "numpy") and hasattr(part, "shape")


def _copies(variable: keras.Variable) -> list[keras.Variable]:
    """The per-replica values of a variable, which may differ."""
    native = variable.value if isinstance(variable, keras.Variable) else variable
    copies = getattr(native, "values", None)
    return list(copies) if isinstance(copies, tuple) else [variable]


def _assigning(variable: keras.Variable, value: np.ndarray) -> Callable[[], object]:
    if hasattr(variable, "assign"):
        return lambda: variable.assign(value)
    return lambda: variable.data.copy_(keras.ops.convert_to_tensor(value))  # PyTorch


def _attributes_of(part: object) -> Callable[[], object]:
    """A function that restores an object's attributes, unless it was built or rebuilt since."""

    def how_built() -> tuple:
        return getattr(part, "built", None), len(getattr(part, "variables", ()))

    def restore() -> None:
        if how_built() == was_built:
            for name, value in before.items():
                if vars(part).get(name) is not value:
                    setattr(part, name, value)

    was_built = how_built()
    before = {
        name: value
        for name, value in vars(part).items()
        if isinstance(value, _PLAIN) or keras.ops.is_tensor(value)
    }
    return restore


def _put_back_random_states(stack: contextlib.ExitStack) -> None:
    """Registers functions that restore what `keras.utils.set_random_seed` sets."""
    stack.callback(random.setstate, random.getstate())
    stack.callback(np.random.set_state, np.random.get_state())
    # The generator of `keras.random` without a seed; a new one is seeded by Python's generator.
    generator = _compat.get_global_seed_generator()
    stack.callback(_compat.set_global_seed_generator, generator)
    if generator is not None:
        stack.callback(generator.state.assign, np.array(aggregation.to_numpy(generator.state)))
    if "tensorflow" in sys.modules:
        stack.enter_context(_compat.tensorflow_random_state())
    if (torch := sys.modules.get("torch")) is not None:
        gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        stack.enter_context(torch.random.fork_rng(devices=gpus))
