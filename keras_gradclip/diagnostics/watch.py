"""What watchers share: the optimizer that they look at, and a ring buffer on its devices."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence

import numpy as np
from keras import backend, ops

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip._types import Model, Optimizer, Strategy, Tensor, Variable
from keras_gradclip.optimizer._hyperparameters import to_numpy
from keras_gradclip.optimizer._telemetry import zeros
from keras_gradclip.optimizer.clipped_optimizer import ClippedOptimizer, find

# A batch may bring several updates: a `train_step` may call `apply` more than once.
UPDATES_IN_A_STEP = 16


def wrapped_optimizer(owner: str, model: Model) -> ClippedOptimizer:
    """The built `ClippedOptimizer` of a compiled model.

    Raises:
        ValueError: the model is not compiled with one or is not built.
    """
    outer: Optimizer = getattr(model, "optimizer", None)
    wrapper = find(outer)
    if wrapper is None:
        raise ValueError(
            f"{owner}: the model's optimizer is {outer!r}, which does not clip. Compile with "
            "ClippedOptimizer(inner_optimizer, clipper), or build a ClippedModel; clipper=None "
            "will do."
        )
    if not wrapper.built:
        if not model.built:
            raise ValueError(
                f"{owner}: the model is not built. Call it on a batch, or give it an Input."
            )
        with strategy_scope(wrapper):
            outer.build(model.trainable_variables)
    return wrapper


def strategy_scope(optimizer: ClippedOptimizer) -> contextlib.AbstractContextManager:
    """The scope of the strategy under which the optimizer was made."""
    strategy: Strategy = optimizer._strategy
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def counter(name: str) -> Variable:
    """A whole number on the device, 0 at first."""
    return zeros((), name, "int32" if backend.backend() == "jax" else "int64")


def sync(model: Model) -> None:
    """Bring the variables up to date: inside an epoch on JAX they are not."""
    if backend.backend() == "jax":
        model.jax_state_sync()


class RingBuffer:
    """Records of several arrays each, written on the device and fetched by the host.

    Args:
        owner: who asks, for the warning.
        capacity: the number of records that wait for the host.
        shapes: of a record's float32 arrays.

    Attributes:
        lost: the number of records that were overwritten before a fetch.
    """

    def __init__(self, owner: str, capacity: int, shapes: Sequence[Sequence[int]]) -> None:
        self.owner, self.capacity, self.lost = owner, capacity, 0
        self._fetched = 0
        self._written = counter("written")
        self._steps = zeros((capacity,), "steps", str(self._written.dtype))
        self._arrays = [zeros((capacity, *shape), "samples") for shape in shapes]
        self.state = [self._written, self._steps, *self._arrays]

    def write(self, step: Tensor, *arrays: Tensor) -> None:
        """Add a record, in replica context."""
        slots = ops.arange(self.capacity, dtype=self._steps.dtype)
        mask = ops.equal(slots, arithmetic.read(self._written) % self.capacity)
        step = ops.cast(step, self._steps.dtype)
        self._steps.assign(ops.where(mask, step, arithmetic.read(self._steps)))
        for variable, value in zip(self._arrays, arrays, strict=True):
            wide = ops.reshape(mask, (-1, *(1 for _ in value.shape)))
            variable.assign(ops.where(wide, value[None], arithmetic.read(variable)))
        self._written.assign(self._written + 1)

    def fetch(self) -> list[tuple[int, list[np.ndarray]]]:
        """The records since the last fetch, oldest first: (step, float64 arrays)."""
        written = int(to_numpy(self._written))
        first = max(self._fetched, written - self.capacity)
        lost = first - self._fetched
        if lost and not self.lost:
            warnings.warn(
                f"{self.owner}: {lost} of {written - self._fetched} updates of one batch were not "
                f"kept: there is room for {self.capacity}. Lower steps_per_execution.",
                stacklevel=2,
            )
        self.lost += lost
        self._fetched = written
        if first == written:
            return []
        steps = to_numpy(self._steps)
        arrays = [np.asarray(to_numpy(v), "float64") for v in self._arrays]
        slots = [i % self.capacity for i in range(first, written)]
        return [(int(steps[i]), [a[i] for a in arrays]) for i in slots]
