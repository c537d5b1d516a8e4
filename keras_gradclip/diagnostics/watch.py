"""What watchers share: the optimizer that they look at, and a ring buffer on its devices."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence

import keras
import numpy as np
from keras import backend, ops

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip import aggregation
from keras_gradclip._types import Strategy, Tensor
from keras_gradclip.optimizer.clipped_optimizer import ClippedOptimizer, find_all

# A batch may bring several updates: a `train_step` may call `apply` more than once.
UPDATES_IN_A_STEP = 16


def watched_optimizers(
    owner: str,
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer | Sequence[keras.optimizers.Optimizer] | None = None,
) -> list[ClippedOptimizer]:
    """The `ClippedOptimizer`s of a compiled model, several under a `MultiOptimizer`.

    They are built if the model is, and else where training builds them.

    Args:
        owner: who asks, for the messages.
        model: compiled.
        optimizer: the ones to watch, in the place of the model's.

    Raises:
        ValueError: there is none.
    """
    own: keras.optimizers.Optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        outer = [own]
        if own is not None and model.built and not own.built:
            with strategy_scope(*find_all(own)[:1]):
                own.build(model.trainable_variables)
    else:
        outer = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    wrappers = list({id(found): found for one in outer for found in find_all(one)}.values())
    if not wrappers:
        what = "the model's optimizer" if optimizer is None else "`optimizer`"
        raise ValueError(
            f"{owner}: {what} is {own if optimizer is None else optimizer!r}, which does not clip. "
            "Compile with ClippedOptimizer(inner_optimizer, clipper), or build a ClippedModel; "
            f"clipper=None will do. Where training uses others, name them: {owner}(..., "
            "optimizer=model.generator_optimizer)."
        )
    built = [wrapper for wrapper in wrappers if wrapper.built]
    # A MultiOptimizer builds those that have variables.
    return built if built and optimizer is None else wrappers


def labels_of(optimizers: Sequence[ClippedOptimizer]) -> list[str]:
    """A name for each of several optimizers, each once; "" for one alone."""
    if len(optimizers) == 1:
        return [""]
    names = [optimizer.inner_optimizer.name for optimizer in optimizers]
    return [
        name if names.count(name) == 1 else f"{name}#{names[: i + 1].count(name)}"
        for i, name in enumerate(names)
    ]


def strategy_scope(*optimizers: ClippedOptimizer) -> contextlib.AbstractContextManager:
    """The scope of the strategy under which the optimizer was made, if there is one."""
    strategies: list[Strategy] = [optimizer._strategy for optimizer in optimizers]
    return strategies[0].scope() if any(strategies) else contextlib.nullcontext()


def counter(name: str) -> keras.Variable:
    """A whole number on the device, 0 at first."""
    return aggregation.zeros((), name, "int32" if backend.backend() == "jax" else "int64")


def sync(model: keras.Model) -> None:
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
        self._steps = aggregation.zeros((capacity,), "steps", str(self._written.dtype))
        self._arrays = [aggregation.zeros((capacity, *shape), "samples") for shape in shapes]
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
        written = int(aggregation.to_numpy(self._written))
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
        steps = aggregation.to_numpy(self._steps)
        arrays = [np.asarray(aggregation.to_numpy(v), "float64") for v in self._arrays]
        slots = [i % self.capacity for i in range(first, written)]
        return [(int(steps[i]), [a[i] for a in arrays]) for i in slots]
