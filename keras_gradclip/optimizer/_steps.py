"""Limits the weight change computed by the inner optimizer.

Adam and its kin divide by the gradient's size: no clip of a gradient limits their updates. A
clipper whose `stage` is "update" then gets the change of the weights itself: after decoupled weight
decay, before moving averages and constraints.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
from keras import ops

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip import _compat, aggregation
from keras_gradclip._types import Gradient, Gradients, Scalar, Tensor


@dataclasses.dataclass(frozen=True)
class UpdateLimit:
    """Limits the changes of weights in one update; called once.

    Attributes:
        positions: `id` to position of the variables whose change may be limited.
        apply: a function of (changes, weights before them), by position, that returns a list of
            the limited changes.
    """

    positions: Mapping[int, int]
    apply: Callable[[Mapping[int, Tensor], Mapping[int, Tensor]], list[Gradient]]

    def __call__(
        self,
        variables: Sequence[keras.Variable],
        changes: Sequence[Tensor],
        before: Sequence[Tensor],
    ) -> list[Tensor]:
        """The limited changes of `variables`; of variables without a limit, as they are."""
        at = [self.positions.get(id(v)) for v in variables]
        limited = self.apply(
            {i: c for i, c in zip(at, changes, strict=True) if i is not None},
            {i: w for i, w in zip(at, before, strict=True) if i is not None},
        )
        return [
            c if i is None or limited[i] is None else limited[i]
            for i, c in zip(at, changes, strict=True)
        ]


def ignores_scale(inner: keras.optimizers.Optimizer) -> bool:
    """Whether a smaller gradient makes no smaller step; of somebody's own it is not known."""
    return not isinstance(inner, keras.optimizers.SGD)


class BoundedSteps:
    """Stands around the update of an inner optimizer.

    Args:
        inner: a Keras optimizer.
        steps: `CompiledUpdate.steps`.
    """

    def __init__(
        self, inner: keras.optimizers.Optimizer, steps: Callable[..., list[Tensor] | None]
    ) -> None:
        self._steps = steps
        self._bound: UpdateLimit | None = None
        self._inner = inner
        self._may_split = _compat.updates_are_separable(inner)

    def attributes(self) -> dict[str, Any]:
        """What the inner optimizer has to be changed by while it applies: see `_compat.changed`."""
        return _compat.wrapped_update(self._inner, self._update)

    @contextlib.contextmanager
    def by(self, bound: UpdateLimit | None) -> Iterator[None]:
        """Inside, each update's steps go through `bound`, which sees the weights of before."""
        self._bound = bound
        try:
            yield
        finally:
            self._bound = None

    def _update(
        self,
        default: Callable[..., None],
        gradients: Gradients,
        variables: Sequence[keras.Variable],
        learning_rate: Scalar,
    ) -> None:
        if self._bound is None:
            default(gradients, variables, learning_rate)
            return
        limited: list[tuple[Gradient, keras.Variable]] = []
        free: list[tuple[Gradient, keras.Variable]] = []
        for gradient, variable in zip(gradients, variables, strict=True):
            is_free = self._may_split and id(variable) not in self._bound.positions
            (free if is_free else limited).append((gradient, variable))
        self._update_bounded(default, self._bound, limited, learning_rate)
        if free:
            default(*zip(*free, strict=True), learning_rate)

    def _update_bounded(
        self,
        default: Callable[..., None],
        bound: UpdateLimit,
        pairs: Sequence[tuple[Gradient, keras.Variable]],
        learning_rate: Scalar,
    ) -> None:
        if not pairs:
            bound([], [], [])
            return
        gradients, variables = zip(*pairs, strict=True)
        steps = self._steps(gradients, variables, learning_rate)
        if steps is not None:
            before = [arithmetic.read(v) for v in variables]
            limited = bound(variables, steps, before)
            sums = [old + step for old, step in zip(before, limited, strict=True)]
            aggregation.assign_each(variables, sums)
            return
        before = [ops.copy(arithmetic.read(v)) for v in variables]
        default(gradients, variables, learning_rate)
        after = [arithmetic.read(v) for v in variables]
        if keras.backend.backend() == "torch":  # which writes into the tensor that was read
            after = [ops.copy(x) for x in after]
        aggregation.assign_each(variables, before)
        steps = [b - a for a, b in zip(before, after, strict=True)]
        bounded = bound(variables, steps, before)
        aggregation.assign_each(
            variables,
            [
                # To the last bit what the optimizer wanted, where nothing was clipped.
                ops.where(ops.equal(wanted, step), new, old + step)
                for old, new, wanted, step in zip(before, after, steps, bounded, strict=True)
            ],
        )
