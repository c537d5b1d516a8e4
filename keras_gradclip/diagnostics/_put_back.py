"""Training on trial: afterwards a model is what it was before.

Put back is what `keras.utils.set_random_seed` sets (`RANDOM_STATES`) and, of the model, its
optimizers and every Keras object that they hold: variables, whether Keras tracks them or not, the
states of random generators, and attributes that are numbers, strings or tensors.
"""

from __future__ import annotations

import contextlib
import functools
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras
import numpy as np

from keras_gradclip import _compat, aggregation
from keras_gradclip.optimizer.clipped_optimizer import ClippedOptimizer

#: Attributes that are put back by value; others are objects that belong to the user.
_PLAIN = (int, float, complex, bool, str, bytes, tuple, frozenset, type(None), np.generic)
_KERAS = (
    *(keras.Layer, keras.optimizers.Optimizer, keras.metrics.Metric, keras.losses.Loss),
    keras.random.SeedGenerator,
)


@contextlib.contextmanager
def everything_put_back(
    model: keras.Model, optimizers: Sequence[ClippedOptimizer]
) -> Iterator[None]:
    """Leave a model, its optimizers and metrics, and all random states as they were."""
    with contextlib.ExitStack() as stack:
        for random_state in RANDOM_STATES:
            stack.enter_context(random_state())
        parts = parts_of([model, *optimizers])
        known = {id(part) for part in parts}
        undo = [undo for part in parts for undo in _ways_back(part)]
        history = getattr(model, "history", None)
        watchers = [(optimizer, optimizer._watchers) for optimizer in optimizers]
        model.train_function = None  # what is traced inside is not for outside, and the reverse
        try:
            yield
        finally:
            for optimizer, of_before in watchers:
                optimizer._watchers = of_before
            now = parts_of([model, *optimizers])
            if any(id(part) not in known for part in now if _is_variable(part)):
                model.reset_metrics()  # metrics that were built on the way
            for put_back in undo:
                put_back()
            model.train_function = None
            model.history = history


def parts_of(roots: Sequence[object]) -> list[Any]:
    """What Keras objects hold in attributes, lists and dicts, at any depth; each once, they too.

    `model.variables` lacks the states of a stateful RNN, and whatever else is hidden from Keras.
    """
    found: dict[int, Any] = {}
    waiting: list[Any] = [*reversed(roots)]
    while waiting:
        part = waiting.pop()
        if id(part) in found:
            continue
        found[id(part)] = part
        if isinstance(part, _KERAS):
            waiting += [*vars(part).values(), *getattr(part, "variables", ())]
            if hasattr(part, "buffers"):  # PyTorch's, of modules of its own as well
                waiting += part.buffers()
        elif isinstance(part, Mapping):
            waiting += part.values()
        elif isinstance(part, (list, tuple, set, frozenset)):
            waiting += part
        elif hasattr(part, "make_seeds"):  # a tf.random.Generator
            waiting.append(part.state)
    return list(found.values())


def _ways_back(part: Any) -> Iterator[Callable[[], object]]:
    """Functions that put back what a part is now."""
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


def _is_variable(part: Any) -> bool:
    """Whether it is a variable of Keras or of the backend, or a tensor that is written into."""
    if isinstance(part, keras.Variable) or hasattr(part, "copy_"):
        return True
    return hasattr(part, "assign") and hasattr(part, "numpy") and hasattr(part, "shape")


def _copies(variable: Any) -> list[Any]:
    """What a variable consists of: each replica may have a value of its own."""
    native = variable.value if isinstance(variable, keras.Variable) else variable
    copies = getattr(native, "values", None)
    return list(copies) if isinstance(copies, tuple) else [variable]


def _assigning(variable: Any, value: np.ndarray) -> Callable[[], object]:
    if hasattr(variable, "assign"):
        return lambda: variable.assign(value)
    return lambda: variable.data.copy_(keras.ops.convert_to_tensor(value))  # of PyTorch


def _attributes_of(part: Any) -> Callable[[], object]:
    """Puts back a Keras object's attributes, unless it was built, or built anew, since."""

    def how_built() -> tuple:
        return getattr(part, "built", None), len(getattr(part, "variables", ()))

    def put_back() -> None:
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
    return put_back


# Random states -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _python() -> Iterator[None]:
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


@contextlib.contextmanager
def _numpy() -> Iterator[None]:
    state = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(state)


@contextlib.contextmanager
def _keras() -> Iterator[None]:
    """The generator of `keras.random` without a seed; made anew, from Python's, if it is new."""
    generator = _compat.get_global_seed_generator()
    state = None if generator is None else np.array(aggregation.to_numpy(generator.state))
    try:
        yield
    finally:
        _compat.set_global_seed_generator(generator)
        if generator is not None:
            generator.state.assign(state)


def _tensorflow() -> AbstractContextManager:
    is_there = "tensorflow" in sys.modules
    return _compat.tensorflow_random_state() if is_there else contextlib.nullcontext()


def _torch() -> AbstractContextManager:
    torch = sys.modules.get("torch")
    if torch is None:
        return contextlib.nullcontext()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return torch.random.fork_rng(devices=gpus)


#: What `keras.utils.set_random_seed` sets: functions that give a context manager each.
RANDOM_STATES: tuple[Callable[[], AbstractContextManager], ...] = (
    *(_python, _numpy, _keras, _tensorflow, _torch),
)
