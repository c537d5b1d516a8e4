"""A pytest plugin for Keras's own tests: every optimizer is wrapped, with the clip out of reach.

`Model.compile` gets a ClippedOptimizer around what it is given. An optimizer that a test applies
by itself stays the object that the test looks at; its `apply` goes by way of a ClippedOptimizer
around it. What a ClippedOptimizer refuses (clipnorm and its kin, accumulation inside) stays bare.
"""

import functools
import threading

import keras
from keras.src.optimizers.optimizer import Optimizer
from keras.src.trainers.trainer import Trainer

import keras_gradclip as kgc

FAR = 1e30
wrapped = {"compile": 0, "apply": 0, "bare": 0}
_wrappers: dict[int, tuple] = {}  # the optimizer is kept, so that its id stays its own


class _Inside(threading.local):
    """The optimizers in whose `apply` this thread is: every replica has a thread of its own."""

    def __init__(self):
        self.ids = set()


_inside = _Inside()


def wrap(optimizer):
    """A ClippedOptimizer around `optimizer`; None where that is refused."""
    try:
        return kgc.ClippedOptimizer(optimizer, kgc.NormClip(FAR))
    except ValueError:
        wrapped["bare"] += 1
        return None


def wrap_compiled(compile):
    @functools.wraps(compile)
    def replaced(self, optimizer="rmsprop", *args, **kwargs):
        optimizer = keras.optimizers.get(optimizer)
        if not isinstance(optimizer, (kgc.ClippedOptimizer, type(None))):
            wrapper = wrap(optimizer)
            _wrappers[id(optimizer)] = (optimizer, None)  # it has one: `apply` needs no other
            wrapped["compile"] += wrapper is not None
            optimizer = wrapper or optimizer
        return compile(self, optimizer, *args, **kwargs)

    return replaced


def wrap_applied(apply):
    @functools.wraps(apply)
    def replaced(self, grads, trainable_variables=None):
        is_own = isinstance(self, kgc.ClippedOptimizer) or id(self) in _inside.ids
        if is_own or keras.src.backend.backend() != "tensorflow":
            return apply(self, grads, trainable_variables)
        if id(self) not in _wrappers:
            _wrappers[id(self)] = (self, wrap(self))
        wrapper = _wrappers[id(self)][1]
        if wrapper is None:
            return apply(self, grads, trainable_variables)
        wrapped["apply"] += 1
        _inside.ids.add(id(self))
        try:
            if not wrapper.built:
                known = self._trainable_variables if self.built else trainable_variables
                wrapper.build(list(known))
            return wrapper.apply(grads, trainable_variables)
        finally:
            _inside.ids.discard(id(self))

    return replaced


def pytest_configure(config):
    config.addinivalue_line("markers", "requires_trainable_backend: Keras's own")
    Trainer.compile = wrap_compiled(Trainer.compile)
    Optimizer.apply = wrap_applied(Optimizer.apply)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"wrapped optimizers: {wrapped}")
    assert wrapped["compile"] + wrapped["apply"] > 0, "nothing was wrapped: Keras has changed"
