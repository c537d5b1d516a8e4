"""The clip and the update of one variable as one program of XLA, which writes its memory in place.

Each large buffer is read once where the clip knows its limits beforehand, and a second time where
they follow from a norm. Variables of one shape share a program.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_gradclip import _kernels as kernels
from keras_gradclip._deferred import Deferred, Later, Rule
from keras_gradclip._types import Gradient, Gradients, Optimizer, Tensor, Variable

#: (gradient, slots, constants) to (what is added to the weight, new slots), as Keras computes them.
Equation = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, Sequence[Tensor]]]
#: (learning rate, number of the step from 1 on) to an equation's constants.
Constants = Callable[[Tensor, Tensor], Sequence[Tensor]]


def _descent(gradient, slots, constants):
    (rate,) = constants
    return -(rate * gradient), slots


def _momentum(gradient, slots, constants):
    rate, momentum = constants
    step = slots[0] * momentum - gradient * rate
    return step, [step]


def _nesterov(gradient, slots, constants):
    rate, momentum = constants
    step = slots[0] * momentum - gradient * rate
    return step * momentum - gradient * rate, [step]


def _sgd(inner: Optimizer) -> tuple[Equation, Constants]:
    if inner.momentum == 0:
        return _descent, lambda rate, step: (rate,)
    return (
        _nesterov if inner.nesterov else _momentum,
        lambda rate, step: (rate, keras.ops.cast(inner.momentum, rate.dtype)),
    )


def _adaptive_moments(gradient, slots, constants):
    import tensorflow as tf

    alpha, share_1, share_2, epsilon = constants
    first = slots[0] + (gradient - slots[0]) * share_1
    second = slots[1] + (tf.square(gradient) - slots[1]) * share_2
    new = [first, second]
    if len(slots) == 3:  # AMSGrad
        second = tf.maximum(slots[2], second)
        new.append(second)
    return -(first * alpha / (tf.sqrt(second) + epsilon)), new


def _adam(inner: Optimizer) -> tuple[Equation, Constants]:
    import tensorflow as tf

    def constants(rate: Tensor, step: Tensor) -> Sequence[Tensor]:
        def cast(value: float) -> Tensor:
            return tf.cast(value, rate.dtype)

        powers = [tf.pow(cast(beta), step) for beta in (inner.beta_1, inner.beta_2)]
        alpha = rate * tf.sqrt(1 - powers[1]) / (1 - powers[0])
        return (alpha, cast(1 - inner.beta_1), cast(1 - inner.beta_2), cast(inner.epsilon))

    return _adaptive_moments, constants


_EQUATIONS: dict[type, Callable[[Optimizer], tuple[Equation, Constants]]] = {
    keras.optimizers.SGD: _sgd,
    keras.optimizers.Adam: _adam,
    keras.optimizers.AdamW: _adam,
}


# Elements. Below, TensorFlow's kernel of Adam takes longer than the operations of its equation: 35
# for 24 microseconds with 100 elements, as long with 8,000 (`benchmarks/tiny.py`).
WORTH_A_KERNEL = {keras.optimizers.Adam: 1 << 13, keras.optimizers.AdamW: 1 << 13}


class FusedUpdate:
    """Clips and updates, for those inner optimizers whose equations are known.

    Args:
        inner: a Keras optimizer.
        may_write_out: small variables may be updated by the operations of an equation.
    """

    def __init__(self, inner: Optimizer, may_write_out: bool) -> None:
        self._inner = inner
        self._least = WORTH_A_KERNEL.get(type(inner), 0) if may_write_out else 0
        self._make = _EQUATIONS.get(type(inner))
        self._worth: frozenset[tuple[int, ...]] = frozenset()  # shapes, known at the clip

    def may_wait(self, gradients: Gradients, variables: Sequence[Variable]) -> Later | None:
        """What the update takes over of this update's clips; called where it is traced."""
        if self._make is None or not kernels.runs_on_tensorflow_cpu():
            return None
        sizes: dict[tuple[int, ...], int] = {}
        for gradient, variable in zip(gradients, variables, strict=True):
            shape = tuple(variable.shape)
            if gradient is not None and _is_plain(gradient, variable):
                sizes[shape] = sizes.get(shape, 0) + math.prod(shape)
        self._worth = frozenset(
            shape
            for shape, size in sizes.items()
            if size >= kernels.WORTH_COMPILING and math.prod(shape) >= kernels.SMALL
        )

        @functools.cache
        def all_are_there() -> Any:
            import tensorflow as tf

            return tf.group(*(kernels.values(g) for g in gradients if g is not None))

        def decide(gradient: Gradient, variable: Variable, rule: Rule) -> Gradient:
            if not _is_plain(gradient, variable):
                return None
            if rule.follows and rule.bounds_step:
                return gradient if self.takes(variable) else None
            if (rule.is_factor and self._takes_factors) or rule.follows:
                return gradient
            # Decoupled weight decay comes before the update: the clip would see its result.
            if self.writes_out(variable):
                return gradient if rule.bounds_step else None
            decays = self._inner.weight_decay and rule.sees is not None and not rule.bounds_step
            # Of Adam, TensorFlow's kernel is faster than XLA, by as much as a pass costs.
            gains = rule.takes_norms or self._takes_factors
            if decays or not gains or tuple(variable.shape) not in self._worth:
                return None
            # By measurement: a program that does little but wait for the memory does not pay while
            # the backward pass wants it, too; one that computes does, on what cores are idle.
            # Until then all gradients are kept. Keras needs as much for a momentum, not for less.
            waits = not rule.takes_norms and self._inner.momentum
            return _after(all_are_there(), gradient) if waits else gradient

        return decide

    @property
    def _takes_factors(self) -> bool:
        """Whether a gradient's factor may be the learning rate's."""
        return type(self._inner) is keras.optimizers.SGD

    def folded(self, deferred: Deferred, rate: Tensor) -> tuple[Tensor, Tensor] | None:
        """Gradient and learning rate of a clip that is but a factor, where the rate may have it."""
        if not (deferred.rule.is_factor and self._takes_factors):
            return None
        (factor,) = deferred.arguments
        return deferred.gradient, rate * keras.ops.cast(factor, rate.dtype)

    def takes(self, variable: Tensor) -> bool:
        """Whether `run` is worth a program of this variable's shape."""
        return tuple(variable.shape) in self._worth or self.writes_out(variable)

    def writes_out(self, variable: Tensor) -> bool:
        """Whether `run` updates a variable by operations in the graph, without a program."""
        import tensorflow as tf

        is_small = math.prod(variable.shape) < self._least
        return is_small and kernels.runs_on_tensorflow_cpu() and not tf.executing_eagerly()

    def constants(self, rate: Tensor, step: Tensor) -> Sequence[Tensor]:
        """What `run` wants of the learning rate and the number of the step; empty without one."""
        return () if self._make is None else list(self._make(self._inner)[1](rate, step))

    def run(
        self,
        deferred: Deferred,
        variable: Tensor,
        slots: Sequence[Tensor],
        constants: Sequence[Tensor],
    ) -> None:
        """Clip and update one native variable, on its device."""
        import tensorflow as tf

        assert self._make is not None
        equation, _ = self._make(self._inner)
        shape, dtype = tuple(variable.shape), variable.dtype
        if self.writes_out(variable):
            program = _operations(equation, deferred.rule, shape, dtype, lambda function: function)
        else:
            program = _program(equation, deferred.rule, shape, dtype, variable.device)
        with tf.device(variable.device):  # without a strategy, others may be elsewhere
            deferred.seen, deferred.bounded = program(
                _of_shape(tf.cast(deferred.gradient, dtype), shape),
                variable.handle,
                [slot.handle for slot in slots],
                [tf.cast(a, tf.float32) for a in deferred.resolved()],
                constants,
            )


def _after(operation: Any, gradient: Gradient) -> Gradient:
    """The same gradient, but not before an operation has been done."""
    import tensorflow as tf

    with tf.control_dependencies([operation]):
        return tf.identity(gradient)


def _of_shape(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    import tensorflow as tf

    return x if x.shape == shape else tf.ensure_shape(x, shape)


def _is_plain(gradient: Gradient, variable: Variable) -> bool:
    """Whether a program may have it: dense, of static shape, float32 like its variable."""
    return (
        not kernels.is_sparse(gradient)
        and keras.backend.standardize_dtype(variable.dtype) == "float32"
        and keras.backend.standardize_dtype(gradient.dtype) == "float32"
    )


@functools.cache
def _program(
    equation: Equation, rule: Rule, shape: tuple[int, ...], dtype: Any, device: str
) -> Callable[..., tuple[Tensor, Tensor]]:
    """`_operations` as a program of XLA, one for each device and shape.

    TensorFlow warns of a function with many traces.
    """
    del device
    import tensorflow as tf

    compiled = functools.partial(tf.function, jit_compile=True, autograph=False)
    return _operations(equation, rule, shape, dtype, compiled)


def _operations(
    equation: Equation,
    rule: Rule,
    shape: tuple[int, ...],
    dtype: Any,
    compiled: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """A function of (gradient, weight, slots, the clip's arguments, constants), in place.

    It returns what `Deferred` has as `seen` and `bounded`. Weight and slots are the handles of
    variables: a variable itself would be taken for the one of the first call, on replicas.
    """
    import tensorflow as tf

    def read(handle: Tensor) -> Tensor:
        return _of_shape(tf.raw_ops.ReadVariableOp(resource=handle, dtype=dtype), shape)

    def assign(handles: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        for handle, value in zip(handles, values, strict=True):
            tf.raw_ops.AssignVariableOp(resource=handle, value=value)

    def look(weight: Tensor) -> Tensor:
        return None if rule.sees is None else rule.sees(weight)

    @compiled
    def clip_and_update(gradient, handle, slots, arguments, constants):
        weight = read(handle)
        seen = look(weight)
        gradient = rule.clip(gradient, seen, *arguments)
        step, new_slots = equation(gradient, [read(s) for s in slots], constants)
        assign((handle, *slots), (weight + step, *new_slots))
        return seen if rule.is_told else None, None

    @compiled
    def take_step(gradient, slots, constants):
        step, new_slots = equation(gradient, [read(s) for s in slots], constants)
        assign(slots, new_slots)
        return step

    @compiled
    def bound_step(step, handle, arguments):
        weight = read(handle)
        seen = look(weight)
        step, bounded = rule.clip(step, seen, *arguments)
        assign((handle,), (weight + step,))
        return seen if rule.is_told else None, bounded

    def update_and_bound(gradient, handle, slots, arguments, constants):
        # In two programs: in one, XLA would compute each step once for its norm and once more.
        return bound_step(take_step(gradient, slots, constants), handle, arguments)

    return update_and_bound if rule.bounds_step else clip_and_update
