"""Fast updates of the inner optimizer: one TensorFlow op per variable, XLA, or Keras's own code.

Keras implements an update as many operations, each a pass over memory (Adam: about 15 for each
variable). For the common optimizers TensorFlow has the same equations as single ops, on CPU and
GPU: they need no compilation and work with every strategy, as each replica updates its own copy.
Updates without such an op are compiled by XLA where that is faster: for large variables only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import keras
from keras import backend

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip import _compat, aggregation
from keras_gradclip._types import Gradient, Gradients, Scalar, Strategy, Tensor
from keras_gradclip.names import path_of

if TYPE_CHECKING:
    import tensorflow as tf

#: Updates one variable: (variable, gradient, *slots), all native.
Kernel = Callable[..., Tensor]
#: (gradient, slots) to the weight update, not yet applied, and the new slots.
Equation = Callable[[Tensor, Sequence[Tensor]], tuple[Tensor, list[Tensor]]]
#: Functions of (optimizer, learning rate, number of the step from 1), scalars of the variables'
#: dtype.
MakeKernel = Callable[[keras.optimizers.Optimizer, Tensor, Tensor], Kernel]
MakeEquation = Callable[[keras.optimizers.Optimizer, Tensor, Tensor], Equation]


def _sgd(inner: keras.optimizers.Optimizer, lr: Tensor, step: Tensor) -> Kernel:
    import tensorflow as tf

    del step
    if inner.momentum == 0:
        return lambda v, g: tf.raw_ops.ResourceApplyGradientDescent(var=v, alpha=lr, delta=g)
    momentum = tf.cast(inner.momentum, lr.dtype)
    return lambda v, g, m: tf.raw_ops.ResourceApplyKerasMomentum(
        var=v, accum=m, lr=lr, grad=g, momentum=momentum, use_nesterov=inner.nesterov
    )


def _betas(inner: keras.optimizers.Optimizer, lr: Tensor, step: Tensor) -> dict[str, Tensor]:
    import tensorflow as tf

    named = {"beta1": inner.beta_1, "beta2": inner.beta_2, "epsilon": inner.epsilon}
    constants = {name: tf.cast(value, lr.dtype) for name, value in named.items()}
    return {**constants, "lr": lr, "beta1_power": tf.pow(constants["beta1"], step)}


def _adam(inner: keras.optimizers.Optimizer, lr: Tensor, step: Tensor) -> Kernel:
    import tensorflow as tf

    constants = _betas(inner, lr * _rounding_of_beta_2(inner.beta_2, step), step)
    constants["beta2_power"] = tf.pow(constants["beta2"], step)
    if inner.amsgrad:
        return lambda v, g, m, s, top: tf.raw_ops.ResourceApplyAdamWithAmsgrad(
            var=v, m=m, v=s, vhat=top, grad=g, **constants
        )
    return lambda v, g, m, s: tf.raw_ops.ResourceApplyAdam(var=v, m=m, v=s, grad=g, **constants)


def _rounding_of_beta_2(beta_2: float, step: Tensor) -> Tensor:
    """Correction factor for TensorFlow's rounding of 1 - β2.

    The op computes 1 - β2 from a rounded β2, Keras rounds the difference: for 0.999 in float32 they
    differ by 1.3e-5, and so do the second moments until (1 - β2)·t exceeds 1.
    """
    import tensorflow as tf

    kernels_own = 1.0 - step.dtype.as_numpy_dtype(beta_2)
    keras_own = step.dtype.as_numpy_dtype(1.0 - beta_2)
    if not 0.0 < keras_own < 1.0 or not 0.0 < kernels_own < 1.0:
        return tf.ones_like(step)
    rates = tf.constant([math.log1p(-kernels_own), math.log1p(-keras_own)], step.dtype)
    grown = tf.math.expm1(step * rates)
    return tf.sqrt(grown[0] / grown[1])


def _adamax(inner: keras.optimizers.Optimizer, lr: Tensor, step: Tensor) -> Kernel:
    import tensorflow as tf

    constants = _betas(inner, lr, step)
    return lambda v, g, m, u: tf.raw_ops.ResourceApplyAdaMax(var=v, m=m, v=u, grad=g, **constants)


def _adadelta(inner: keras.optimizers.Optimizer, lr: Tensor, step: Tensor) -> Kernel:
    import tensorflow as tf

    del step
    rho, epsilon = tf.cast(inner.rho, lr.dtype), tf.cast(inner.epsilon, lr.dtype)
    return lambda v, g, squares, deltas: tf.raw_ops.ResourceApplyAdadelta(
        var=v, accum=squares, accum_update=deltas, lr=lr, rho=rho, epsilon=epsilon, grad=g
    )


#: Optimizers whose equations are exactly those of a TensorFlow op.
_KERNELS: dict[type, MakeKernel] = {
    keras.optimizers.SGD: _sgd,
    keras.optimizers.Adam: _adam,
    keras.optimizers.AdamW: _adam,
    keras.optimizers.Adamax: _adamax,
    keras.optimizers.Adadelta: _adadelta,
}


def _adam_equation(inner: keras.optimizers.Optimizer, lr: Tensor, step: Tensor) -> Equation:
    import tensorflow as tf

    powers = [tf.pow(tf.cast(beta, lr.dtype), step) for beta in (inner.beta_1, inner.beta_2)]
    alpha = lr * tf.sqrt(1 - powers[1]) / (1 - powers[0])
    numbers = (1 - inner.beta_1, 1 - inner.beta_2, inner.epsilon)
    share_1, share_2, epsilon = (tf.cast(number, lr.dtype) for number in numbers)

    def change(gradient: Tensor, slots: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        first = slots[0] + (gradient - slots[0]) * share_1
        second = slots[1] + (tf.square(gradient) - slots[1]) * share_2
        new = [first, second]
        if len(slots) == 3:  # AMSGrad
            second = tf.maximum(slots[2], second)
            new.append(second)
        return -(first * alpha / (tf.sqrt(second) + epsilon)), new

    return change


#: Keras's equations, for limited updates, and for very small variables.
_EQUATIONS: dict[type, MakeEquation] = {
    keras.optimizers.Adam: _adam_equation,
    keras.optimizers.AdamW: _adam_equation,
}
#: In elements. For smaller variables the plain equation is faster than TensorFlow's op.
WORTH_AN_OPERATION = 1 << 13

# Optimizers with many element-wise operations. Others use norms or matrix products, which XLA
# computes more slowly than TensorFlow on a CPU; custom optimizers are unknown.
_GAIN_BY_XLA = (
    keras.optimizers.Adagrad,
    keras.optimizers.Ftrl,
    keras.optimizers.Lion,
    keras.optimizers.Nadam,
    keras.optimizers.RMSprop,
)


# Methods that an op does not call. If set on an object, the update is left to Keras.
_REPLACED = ("apply", "apply_gradients", "update_step", "assign", "assign_add", "assign_sub")


class CompiledUpdate:
    """Runs the updates of one inner optimizer, or leaves them to Keras.

    `mode` "auto" compiles where possible and faster; True insists, and raises a ValueError for a
    variable that cannot be; False leaves all to Keras.
    """

    def __init__(self, inner: keras.optimizers.Optimizer, mode: bool | str) -> None:
        self._inner = inner
        self.mode = mode
        #: Path of a variable to the reason why it is left to Keras.
        self._refused: dict[str, str] = {}
        self._impossible = self._why_not()
        self.methods()
        if self._reason and mode is True:
            raise ValueError(_cannot(self._reason))

    def methods(self) -> dict[str, Callable[..., None]]:
        """The replacements of the inner optimizer's methods: see `_compat.changed`."""
        own = next((method for method in _REPLACED if method in vars(self._inner)), None)
        kind = type(self._inner).__name__
        self._reason = f"{own} was set on this {kind}" if own else self._impossible
        if self._reason:
            return {}
        methods = {_compat.UPDATE_NATIVES: self._update}
        if self._inner.weight_decay is not None:
            methods[_compat.DECAY] = functools.partial(_compat.decay_by_one_rate, self._inner)
        return methods

    def _why_not(self) -> str | None:
        """The reason why no variable can be compiled, or None."""
        name = type(self._inner).__name__
        if self.mode is False:
            return "compiled=False"
        if backend.backend() != "tensorflow":
            return f"the backend is {backend.backend()}, not tensorflow"
        if not _compat.updates_are_replaceable(self._inner):
            return f"{name} or this Keras has its own way to update a list of variables"
        known = type(self._inner) in _KERNELS or type(self._inner) in _GAIN_BY_XLA
        if not known and self.mode == "auto":
            return f"{name} is not known to gain; compiled=True tries it"
        return None

    def __str__(self) -> str:
        """The text of `ClippedOptimizer.compiled`."""
        if self._reason:
            return f"no: {self._reason}"
        if not self._refused:
            return "yes"
        reasons = [f"{reason} of {path}" for path, reason in self._refused.items()]
        more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        return f"yes, except {'; '.join(reasons[:3])}{more}"

    def _update(
        self,
        default: Callable[..., None],
        strategy: Strategy,
        pairs: Sequence[tuple[Gradient, Tensor]],
        learning_rate: Scalar,
    ) -> None:
        """Updates native variables, instead of `default`, Keras's own function."""
        if _compat.is_traced_for_xla():  # the whole step is compiled already
            default(strategy, pairs, learning_rate)
            return
        chosen: list[tuple[Gradient, Tensor]] = []
        left: list[tuple[Gradient, Tensor]] = []
        for gradient, variable in pairs:
            reason = self._unfit(gradient, variable)
            (left if reason else chosen).append((gradient, variable))
            if reason and self.mode is True:
                raise ValueError(_cannot(f"{reason} of {path_of(variable)}"))
            if reason:
                self._refused[path_of(variable)] = reason
        with aggregation.without_waiting():
            if type(self._inner) in _KERNELS:
                gradients, natives = ([pair[k] for pair in chosen] for k in range(2))
                self._run(strategy, natives, gradients, learning_rate, True)
            else:
                left += self._update_by_xla(strategy, chosen, learning_rate)
        if left:
            default(strategy, left, learning_rate)

    def steps(
        self, gradients: Gradients, variables: Sequence[keras.Variable], learning_rate: Scalar
    ) -> list[Tensor] | None:
        """The weight updates, not yet applied, with the slots updated; in replica context.

        None if there is no such function: then update the weights and take the difference.
        """
        if type(self._inner) not in _EQUATIONS or self._reason:
            return None
        import tensorflow as tf

        if tf.executing_eagerly() or _compat.is_traced_for_xla():
            return None
        natives = [v.value if isinstance(v, keras.Variable) else v for v in variables]
        if any(self._unfit(g, v) for g, v in zip(gradients, natives, strict=True)):
            return None
        rate = arithmetic.read(learning_rate)
        with aggregation.without_waiting():
            return _compat.merge_call(self._run, natives, list(gradients), rate, False)

    def _unfit(self, gradient: Gradient, variable: Tensor) -> str | None:
        if arithmetic.is_sparse(gradient):
            return "sparse gradient"
        if variable.dtype.name not in ("float32", "float64"):
            return f"{variable.dtype.name}"
        if type(self._inner) in _KERNELS and _compat.slots(self._inner, variable) is None:
            return "setting changed after the build"  # Keras raises the error
        return None

    def _run(
        self,
        strategy: Strategy,
        natives: Sequence[Tensor],
        gradients: Sequence[Gradient],
        learning_rate: Scalar,
        applies: bool,
    ) -> list[Tensor]:
        """Updates native variables, or returns their weight updates; in cross-replica context.

        A variable is updated by a TensorFlow op; small ones together by the equation, as is every
        weight update that is only returned.
        """
        import tensorflow as tf

        inner = self._inner
        has_equation = type(inner) in _EQUATIONS and not tf.executing_eagerly()
        shares = has_equation and (not applies or arithmetic.runs_on_tensorflow_cpu())
        least = WORTH_AN_OPERATION if shares else 0
        programs = None if applies else arithmetic.Programs(natives)
        made: dict[tuple, Callable] = {}  # its scalars are computed once per device

        def of_group(
            first: Tensor,
            variables: list[Tensor],
            gradients: list[Gradient],
            slots: list[list[Tensor]],
            rate: Scalar,
        ) -> list[Tensor]:
            by_operation = applies and first.shape.num_elements() >= least
            make = (_KERNELS if by_operation else _EQUATIONS)[type(inner)]
            key = (make, first.device, first.dtype)
            if key not in made:
                step = tf.cast(arithmetic.read(inner.iterations) + 1, first.dtype)
                made[key] = make(inner, tf.cast(rate, first.dtype), step)
            gradients = [tf.cast(g, v.dtype) for g, v in zip(gradients, variables, strict=True)]
            if by_operation:
                made[key](first.handle, gradients[0], *(slot.handle for slot in slots[0]))
                return []
            gradients = [
                tf.ensure_shape(g, v.shape) for g, v in zip(gradients, variables, strict=True)
            ]
            equation = made[key]
            if programs and len(variables) == 1 and programs.pays(gradients[0]):
                equation = functools.partial(programs.run, first.device, equation)
            changes = _changes(equation, gradients, slots)
            if not applies:
                return changes
            for variable, change in zip(variables, changes, strict=True):
                variable.assign_add(change)
            return []

        slots = [[slot.value for slot in _compat.slots(inner, v) or ()] for v in natives]
        groups: dict[object, list[int]] = {}  # small variables of a device together
        for i, v in enumerate(natives):
            is_small = v.shape.num_elements() < least
            groups.setdefault((v.device, v.dtype) if is_small else i, []).append(i)
        result: dict[int, Tensor] = {}
        for group in groups.values():
            lists = [[of[i] for i in group] for of in (natives, gradients, slots)]
            arguments = (*lists, arithmetic.read(learning_rate))
            changes = strategy.extended.update(natives[group[0]], of_group, args=arguments)
            result |= dict(zip(group, changes, strict=False))
        return [result[i] for i in sorted(result)]

    def _update_by_xla(
        self, strategy: Strategy, pairs: Sequence[tuple[Gradient, Tensor]], learning_rate: Scalar
    ) -> list[tuple[Gradient, Tensor]]:
        """Updates the pairs that are worth compiling; returns the others."""
        import tensorflow as tf

        least = 0 if self.mode is True else arithmetic.SMALL
        large = [pair for pair in pairs if pair[1].shape.num_elements() >= least]
        size = sum(variable.shape.num_elements() for _, variable in large)
        several = strategy.num_replicas_in_sync > 1
        copies = [strategy.experimental_local_results(variable) for _, variable in large[:1]]
        compilations = len(copies[0]) if copies else 1  # one per device
        reason = None
        if tf.executing_eagerly():
            reason = "eager execution"
        elif size < arithmetic.WORTH_COMPILING * compilations and self.mode == "auto":
            reason = f"{size} elements in large variables are too few to pay for XLA"
        elif not several and len({variable.device for _, variable in large}) > 1:
            reason = "variables on several devices"
        rate = arithmetic.read(learning_rate)  # one per replica, with a schedule
        if not several:
            rate = tf.convert_to_tensor(rate)
        if reason is None and not type(self._inner).__module__.startswith("keras."):
            reason = "its update is not Keras's, and there are several replicas"
            if not several:
                function = self._xla_function([variable for _, variable in large])
                missing = _compat.operations_without_xla(
                    function.get_concrete_function([g for g, _ in large], rate)
                )
                reason = f"XLA does not know {', '.join(missing)}" if missing else None
        if reason is not None:
            if self.mode is True:
                raise ValueError(_cannot(reason))
            self._reason = reason
            return list(pairs)
        self._reason = None  # from an earlier eager step

        def of_one(
            _: Tensor, gradients: list[Tensor], variables: list[Tensor], rate: Tensor
        ) -> None:
            gradients = [
                tf.ensure_shape(gradient, variable.shape)
                for gradient, variable in zip(gradients, variables, strict=True)
            ]
            self._xla_function(variables)(gradients, rate)

        arguments = ([g for g, _ in large], [v for _, v in large], rate)
        strategy.extended.update(large[0][1], of_one, args=arguments, group=False)
        return [pair for pair in pairs if pair[1].shape.num_elements() < least]

    def _xla_function(
        self, variables: Sequence[Tensor]
    ) -> tf.types.experimental.PolymorphicFunction:
        """A tf.function of (gradients, learning rate) for the variables of one device."""
        import tensorflow as tf

        def run(gradients: list[Tensor], rate: Scalar) -> None:
            for gradient, variable in zip(gradients, variables, strict=True):
                self._inner.update_step(gradient, variable, rate)

        return tf.function(run, jit_compile=True, autograph=False)


def _changes(
    equation: Equation, gradients: Sequence[Tensor], slots: Sequence[Sequence[Tensor]]
) -> list[Tensor]:
    """The weight updates, not yet applied; the slots are updated.

    Several variables share the operations, which cost more than their elements.
    """
    import tensorflow as tf

    lists = [gradients, *zip(*slots, strict=True)]  # of one kind each
    if len(gradients) == 1:
        change, new = equation(gradients[0], [tf.convert_to_tensor(slot) for slot in slots[0]])
        results = [[value] for value in (change, *new)]
    else:
        shapes = [g.shape for g in gradients]
        joined = [
            tf.concat([x if x.shape.rank == 1 else tf.reshape(x, (-1,)) for x in tensors], 0)
            for tensors in lists
        ]
        change, new = equation(joined[0], joined[1:])
        results = [tf.split(x, [shape.num_elements() for shape in shapes]) for x in (change, *new)]
        results = [
            [
                x if shape.rank == 1 else tf.reshape(x, shape)
                for x, shape in zip(parts, shapes, strict=True)
            ]
            for parts in results
        ]
    for of_kind, values in zip(lists[1:], results[1:], strict=True):
        for slot, value in zip(of_kind, values, strict=True):
            slot.assign(value)
    return results[0]


def _cannot(reason: str) -> str:
    return (
        f"ClippedOptimizer: compiled=True, but the update cannot be compiled: {reason}. Use "
        "compiled='auto', which compiles what it can."
    )
