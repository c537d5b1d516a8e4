"""The dynamic loss scale of a `LossScaleOptimizer` around the optimizer, as in mixed_float16."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import keras
from keras import ops

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip import _compat, aggregation
from keras_gradclip._types import Gradient, Scalar, Tensor


class DynamicLossScale:
    """The scale of a `LossScaleOptimizer`: halves at an overflow, doubles later.

    Args:
        outer: the `LossScaleOptimizer`.
    """

    def __init__(self, outer: keras.optimizers.Optimizer) -> None:
        self._outer = outer

    def factor(self) -> Scalar:
        """The scale of this step."""
        return arithmetic.read(self._outer.dynamic_scale)

    def on_finite(self) -> None:
        """Doubles the scale every `dynamic_growth_steps` finite updates."""
        outer = self._outer
        full = ops.equal(outer.step_counter, outer.dynamic_growth_steps - 1)
        counter, scale = arithmetic.read(outer.step_counter), arithmetic.read(outer.dynamic_scale)
        outer.step_counter.assign(ops.where(full, ops.zeros_like(counter), counter + 1))
        outer.dynamic_scale.assign(ops.where(full, scale * 2.0, scale))

    def on_skip(self, was_finite: Tensor) -> None:
        """Halves the scale after an overflow, not after a spike."""
        outer = self._outer
        counter, scale = arithmetic.read(outer.step_counter), arithmetic.read(outer.dynamic_scale)
        outer.step_counter.assign(ops.where(was_finite, counter, ops.zeros_like(counter)))
        outer.dynamic_scale.assign(ops.where(was_finite, scale, scale * 0.5))


def take_over(
    optimizer: keras.optimizers.Optimizer, factor: object, kind: type[keras.optimizers.Optimizer]
) -> bool:
    """Takes over the `LossScaleOptimizer` that assigns a `loss_scale_factor` to the optimizer.

    Its constructor assigns None to the optimizer that it wraps, its only trace. From then on it
    checks for finite gradients after the sum over replicas; Keras's checks the first replica's.

    `kind` is `ClippedOptimizer`, whose `apply` takes a `DynamicLossScale`. Returns whether the
    `LossScaleOptimizer` was found; raises a ValueError if the factor is not None.
    """
    if factor is not None:
        raise ValueError(
            f"ClippedOptimizer: set loss_scale_factor={factor!r} on the inner optimizer."
        )
    optimizer.inner_optimizer.loss_scale_factor = None
    if keras.backend.backend() != "tensorflow":
        return True
    outer = _compat.find_wrapping_loss_scale(optimizer)
    if outer is None:
        return False
    name = _compat.method_that_applies(outer)
    ours = (outer, kind, getattr(outer, name))
    setattr(outer, name, functools.partial(_apply_scaled, *ours))
    if type(outer) is keras.optimizers.LossScaleOptimizer:  # a subclass builds in its own way
        outer.scale_loss = functools.partial(_scale_loss, outer)
    return True


def _scale_loss(outer: keras.optimizers.Optimizer, loss: Scalar) -> Scalar:
    """`LossScaleOptimizer.scale_loss` that creates the scale when the first step is traced.

    Before the optimizer is built, Keras's multiplies by a constant; as the same trace builds the
    optimizer later, a second trace would be needed.
    """
    if not _has_scale(outer) and aggregation.can_leave_the_trace():
        _make_scale(outer)
    scale = outer.dynamic_scale if _has_scale(outer) else outer.initial_scale
    return ops.multiply(loss, scale)


def _build(outer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]) -> None:
    """`LossScaleOptimizer.build` whose scale may exist already."""
    if type(outer) is not keras.optimizers.LossScaleOptimizer:
        outer.build(variables)
        return
    if not _has_scale(outer):
        _make_scale(outer)
    outer.inner_optimizer.build(variables)
    keras.optimizers.Optimizer.build(outer, variables)


def _has_scale(outer: keras.optimizers.Optimizer) -> bool:
    return hasattr(outer, "dynamic_scale")


def _make_scale(outer: keras.optimizers.Optimizer) -> None:
    """Creates the two variables of a `LossScaleOptimizer`, as it does itself."""
    with aggregation.outside_of_traces():
        for name, dtype, initializer in (
            ("step_counter", "int", "zeros"),
            ("dynamic_scale", "float32", keras.initializers.Constant(outer.initial_scale)),
        ):
            variable = outer.add_variable(
                (), initializer=initializer, dtype=dtype, aggregation="none", name=name
            )
            object.__setattr__(outer, name, variable)  # untracked, as in Keras


def _apply_scaled(
    outer: keras.optimizers.Optimizer,
    kind: type[keras.optimizers.Optimizer],
    own: Callable[..., None],
    grads: Sequence[Gradient],
    trainable_variables: Sequence[keras.Variable] | None = None,
) -> None:
    """`LossScaleOptimizer.apply` that reduces first and then checks for finite gradients.

    `own` is Keras's method, used if the wrapped optimizer has been replaced since.
    """
    if not isinstance(outer.inner_optimizer, kind):
        own(grads, trainable_variables)
        return
    if not outer.built and trainable_variables is not None:
        _build(outer, list(trainable_variables))
        outer.built = True
    kind.apply(outer.inner_optimizer, grads, trainable_variables, DynamicLossScale(outer))
