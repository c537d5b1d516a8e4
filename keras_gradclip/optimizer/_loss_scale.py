"""Who scales the loss, and what an overflow does to the scale."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import keras
from keras import ops

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip import _compat, aggregation
from keras_gradclip._types import Gradient, Scalar, Tensor


class LossScale(Protocol):
    """The loss scale of an update; adjusted after it was applied or skipped."""

    #: Whether an update that is not finite is left out whatever `skip_nonfinite` says.
    checks_finite: bool

    def factor(self) -> Scalar:
        """The factor in the loss, and so in the gradients."""

    def on_finite(self) -> None:
        """The update was applied."""

    def on_skip(self, was_finite: Tensor) -> None:
        """The update was left out: an overflow, or if `was_finite` a spike."""


class FixedLossScale:
    """The inner optimizer's `loss_scale_factor`; 1 without one."""

    checks_finite = False

    def __init__(self, inner: keras.optimizers.Optimizer) -> None:
        self._inner = inner

    def factor(self) -> float:
        """The factor that the user set."""
        return self._inner.loss_scale_factor or 1.0

    # AutoGraph, around a loop of one's own, warns of a body that is but a docstring.

    def on_finite(self) -> None:
        """A fixed scale stays."""
        return

    def on_skip(self, was_finite: Tensor) -> None:
        """A fixed scale stays."""
        del was_finite


class UnknownLossScale(FixedLossScale):
    """Somebody scales the loss and we cannot tell who: at least never apply an infinity."""

    checks_finite = True


class DynamicLossScale:
    """Keras's `LossScaleOptimizer` around the optimizer: halves at an overflow, doubles later."""

    checks_finite = True

    def __init__(self, outer: keras.optimizers.Optimizer) -> None:
        self._outer = outer

    def factor(self) -> Scalar:
        """The scale of this step."""
        return arithmetic.read(self._outer.dynamic_scale)

    def on_finite(self) -> None:
        """Double the scale every `dynamic_growth_steps` finite updates."""
        outer = self._outer
        full = ops.equal(outer.step_counter, outer.dynamic_growth_steps - 1)
        counter, scale = arithmetic.read(outer.step_counter), arithmetic.read(outer.dynamic_scale)
        outer.step_counter.assign(ops.where(full, ops.zeros_like(counter), counter + 1))
        outer.dynamic_scale.assign(ops.where(full, scale * 2.0, scale))

    def on_skip(self, was_finite: Tensor) -> None:
        """Halve the scale after an overflow; a spike says nothing of it."""
        outer = self._outer
        counter, scale = arithmetic.read(outer.step_counter), arithmetic.read(outer.dynamic_scale)
        outer.step_counter.assign(ops.where(was_finite, counter, ops.zeros_like(counter)))
        outer.dynamic_scale.assign(ops.where(was_finite, scale, scale * 0.5))


def wrapping_loss_scale(
    kind: type[keras.optimizers.Optimizer],
    optimizer: keras.optimizers.Optimizer,
    factor: object,
    own: LossScale,
) -> LossScale:
    """The loss scale of `optimizer`, to whose `loss_scale_factor` something is assigned.

    `LossScaleOptimizer.__init__` assigns None to the optimizer that it wraps, which is the only
    sign of it; its `apply` is replaced by one that asks for finiteness after the reduction.

    Args:
        kind: `ClippedOptimizer`, whose `apply` takes a `LossScale`.
        optimizer: one of them.
        factor: what is assigned.
        own: the optimizer's loss scale so far.

    Raises:
        ValueError: the factor is not None.
    """
    if factor is not None:
        raise ValueError(
            f"ClippedOptimizer: set loss_scale_factor={factor!r} on the inner optimizer."
        )
    optimizer.inner_optimizer.loss_scale_factor = None
    if not aggregation.is_tensorflow():
        return own
    outer = _compat.find_wrapping_loss_scale(optimizer)
    if outer is None:
        return UnknownLossScale(optimizer.inner_optimizer)
    # Its own `apply` asks the first replica alone whether the gradients are finite.
    name = _compat.method_that_applies(outer)
    ours = (outer, kind, getattr(outer, name))
    setattr(outer, name, functools.partial(_apply_scaled, *ours))
    if type(outer) is keras.optimizers.LossScaleOptimizer:  # no other way to build
        outer.build = functools.partial(_build_scaled, outer)
        outer.scale_loss = functools.partial(_scale_loss, outer)
    return own


def _scale_loss(outer: keras.optimizers.Optimizer, loss: Scalar) -> Scalar:
    """`LossScaleOptimizer.scale_loss` that makes the scale where the first step is traced.

    Keras's multiplies by a constant as long as the optimizer is not built, which the same trace
    does later: there would have to be another.
    """
    if not _has_scale(outer) and aggregation.can_leave_the_trace():
        _make_scale(outer)
    scale = outer.dynamic_scale if _has_scale(outer) else outer.initial_scale
    return ops.multiply(loss, scale)


def _build_scaled(outer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]) -> None:
    """`LossScaleOptimizer.build` whose scale may be there before it knows the variables."""
    if not _has_scale(outer):
        _make_scale(outer)
    outer.inner_optimizer.build(variables)
    keras.optimizers.Optimizer.build(outer, variables)


def _has_scale(outer: keras.optimizers.Optimizer) -> bool:
    return hasattr(outer, "dynamic_scale")


def _make_scale(outer: keras.optimizers.Optimizer) -> None:
    """The two variables of a `LossScaleOptimizer`, as it makes them."""
    with aggregation.outside_of_traces():
        for name, dtype, initializer in (
            ("step_counter", "int", "zeros"),
            ("dynamic_scale", "float32", keras.initializers.Constant(outer.initial_scale)),
        ):
            variable = outer.add_variable(
                (), initializer=initializer, dtype=dtype, aggregation="none", name=name
            )
            object.__setattr__(outer, name, variable)  # Keras does not track it by name, either


def _apply_scaled(
    outer: keras.optimizers.Optimizer,
    kind: type[keras.optimizers.Optimizer],
    own: Callable[..., None],
    grads: Sequence[Gradient],
    trainable_variables: Sequence[keras.Variable] | None = None,
) -> None:
    """`LossScaleOptimizer.apply` that reduces first and asks for finiteness afterwards.

    `own` is Keras's, for an optimizer that was put in the place of ours since.
    """
    if not isinstance(outer.inner_optimizer, kind):
        own(grads, trainable_variables)
        return
    if not outer.built and trainable_variables is not None:
        outer.build(list(trainable_variables))
        outer.built = True
    kind.apply(outer.inner_optimizer, grads, trainable_variables, DynamicLossScale(outer))
