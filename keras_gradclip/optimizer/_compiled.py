"""Fast updates of the inner optimizer: one TensorFlow op per variable, XLA, or Keras's own code.

Keras implements an update as many operations, each a pass over memory (Adam: about 15 for each
variable). For the common optimizers TensorFlow has the same equations as single ops, on CPU and
GPU: they need no compilation and work with every strategy, as each replica updates its own copy.
Updates without such an op are compiled by XLA where that is faster: for large variables only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING

import keras
from keras import backend, ops

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip import _compat
from keras_gradclip._types import Gradient, Gradients, Scalar, Strategy, Tensor
from keras_gradclip.clippers.enforce import Postponed
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


def _sgd_equation(inner: keras.optimizers.Optimizer, lr: Tensor, step: Tensor) -> Equation:
    import tensorflow as tf

    del step
    momentum = tf.cast(inner.momentum, lr.dtype)

    def change(gradient: Tensor, slots: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        if not slots:
            return -(gradient * lr), []
        new = slots[0] * momentum - gradient * lr
        return new * momentum - gradient * lr if inner.nesterov else new, [new]

    return change


#: Keras's equations, for limited updates, and for programs that clip and update.
_EQUATIONS: dict[type, MakeEquation] = {
    keras.optimizers.SGD: _sgd_equation,
    keras.optimizers.Adam: _adam_equation,
    keras.optimizers.AdamW: _adam_equation,
}
#: Optimizers whose equation is faster for smaller variables than TensorFlow's op, in elements.
_SHARED = (keras.optimizers.Adam, keras.optimizers.AdamW)
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

    Args:
        inner: a Keras optimizer.
        mode: "auto" compiles where possible and faster, True insists, False leaves all to Keras.

    Attributes:
        mode: as given.

    Raises:
        ValueError: `mode` is True and nothing can be compiled; or, at the first update, one of
            the variables cannot be.
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
            if reason:
                self._refuse(variable, reason)
        if type(self._inner) in _KERNELS:
            gradients, natives = ([pair[k] for pair in chosen] for k in range(2))
            self._run(strategy, natives, gradients, learning_rate, True)
        else:
            left += self._update_by_xla(strategy, chosen, learning_rate)
        if left:
            default(strategy, left, learning_rate)

    def has_equation(self) -> bool:
        """Whether weight updates can be computed here without applying them."""
        inner = self._inner
        if type(inner) not in _EQUATIONS or self._reason or inner.loss_scale_factor:
            return False
        import tensorflow as tf

        return not tf.executing_eagerly() and not _compat.is_traced_for_xla()

    def steps(
        self,
        gradients: Gradients,
        variables: Sequence[keras.Variable],
        learning_rate: Scalar,
        alone: Mapping[int, int | None],
    ) -> list[Tensor] | None:
        """The weight updates, not yet applied, with the slots updated; in replica context.

        Those of large variables whose `id` is in `alone`, and of their biases, are `Postponed`.

        None if there is no such function: then update the weights and take the difference.
        """
        if not self.has_equation():
            return None
        import tensorflow as tf

        natives = [v.value for v in variables]
        if any(self._unfit(g, v) for g, v in zip(gradients, natives, strict=True)):
            return None
        large = arithmetic.worth_compiling(variables)
        rate = arithmetic.read(learning_rate)
        postponed: dict[int | None, Postponed] = {}  # by id of the variable
        pairs = [(v, g) for v, g in zip(variables, gradients, strict=True) if id(v) in alone]
        for v, gradient in sorted(pairs, key=lambda pair: alone[id(pair[0])] is not None):
            kernel, is_known = alone[id(v)], isinstance(gradient, Postponed)
            fits = kernel is None and (is_known or arithmetic.pays(gradient, large))
            if fits or kernel in postponed:
                one = gradient if is_known else Postponed(tf.cast(gradient, v.dtype))
                one.kernel = postponed.get(kernel)
                one.equation = functools.partial(self._change, v, rate)
                postponed[id(v)] = one
        result: list[Tensor] = [
            postponed.get(id(v)) or (g.clipped() if isinstance(g, Postponed) else g)
            for g, v in zip(gradients, variables, strict=True)
        ]
        now = [i for i, x in enumerate(result) if not isinstance(x, Postponed)]
        lists = [[of[i] for i in now] for of in (natives, result)]
        for i, change in zip(now, _compat.merge_call(self._run, *lists, rate, False), strict=True):
            result[i] = change
        return result

    def _change(self, variable: keras.Variable, rate: Tensor, gradient: Tensor) -> Tensor:
        """The weight update of a variable, computed for figures; nothing is applied."""
        make = _EQUATIONS[type(self._inner)]
        step = ops.cast(arithmetic.read(self._inner.iterations) + 1, variable.dtype)
        equation = make(self._inner, ops.cast(rate, variable.dtype), step)
        slots = _compat.slots(self._inner, variable) or ()
        return equation(gradient, [arithmetic.read(slot) for slot in slots])[0]

    def run(
        self,
        variables: Sequence[keras.Variable],
        postponed: Sequence[Postponed],
        learning_rate: Scalar,
    ) -> None:
        """Updates variables by the programs that clip their gradients; in replica context."""
        rate = arithmetic.read(learning_rate)
        _compat.merge_call(self._run, [v.value for v in variables], list(postponed), rate, True)

    def _unfit(self, gradient: Gradient, variable: Tensor) -> str | None:
        if arithmetic.is_sparse(gradient):
            return "sparse gradient"
        if variable.dtype.name not in ("float32", "float64"):
            return f"{variable.dtype.name}"
        if type(self._inner) in _KERNELS and _compat.slots(self._inner, variable) is None:
            return "setting changed after the build"  # Keras raises the error
        return None

    def _refuse(self, variable: Tensor, reason: str) -> None:
        path = path_of(variable)
        if self.mode is True:
            raise ValueError(_cannot(f"{reason} of {path}"))
        self._refused[path] = reason

    def _run(
        self,
        strategy: Strategy,
        natives: Sequence[Tensor],
        gradients: Sequence[Gradient],
        learning_rate: Scalar,
        applies: bool,
    ) -> list[Tensor]:
        """Updates native variables, or returns their weight updates; in cross-replica context.

        A variable is updated by a TensorFlow op, small ones together by the equation, and those
        with a `Postponed` clip by an XLA program; what is only returned, by the equation.
        """
        import tensorflow as tf

        inner = self._inner
        is_faster = type(inner) in _SHARED and not tf.executing_eagerly()
        shares = is_faster and (not applies or arithmetic.runs_on_tensorflow_cpu())
        least = WORTH_AN_OPERATION if shares else 0
        made: dict[Hashable, Callable] = {}  # its scalars are computed once per device

        def of_group(
            first: Tensor,
            variables: list[Tensor],
            gradients: list[Gradient],
            slots: list[list[Tensor]],
            rate: Scalar,
        ) -> list[Tensor]:
            is_program = isinstance(gradients[0], Postponed)  # and so are all
            by_operation = applies and first.shape.num_elements() >= least and not is_program
            make = (_KERNELS if by_operation else _EQUATIONS)[type(inner)]
            key = (make, first.device, first.dtype)
            if key not in made:
                step = tf.cast(arithmetic.read(inner.iterations) + 1, first.dtype)
                made[key] = make(inner, tf.cast(rate, first.dtype), step)
            if is_program:
                _run_program(made, made[key], gradients, variables, slots)
                return []
            gradients = [
                tf.ensure_shape(tf.cast(g, v.dtype), v.shape)
                for g, v in zip(gradients, variables, strict=True)
            ]
            if by_operation:
                made[key](first.handle, gradients[0], *(slot.handle for slot in slots[0]))
                return []
            changes = _changes(made[key], gradients, slots)
            if not applies:
                return changes
            for variable, change in zip(variables, changes, strict=True):
                variable.assign_add(change)
            return []

        slots = [[slot.value for slot in _compat.slots(inner, v) or ()] for v in natives]
        groups: dict[object, list[int]] = {}  # small variables of a device together
        for i, (v, gradient) in enumerate(zip(natives, gradients, strict=True)):
            local = strategy.experimental_local_results(gradient)[0]
            key: object = i
            if isinstance(local, Postponed):
                key = id(local.kernel or local)
            elif v.shape.num_elements() < least:
                key = (v.device, v.dtype)
            groups.setdefault(key, []).append(i)
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


def _run_program(
    programs: dict[Hashable, Callable],
    equation: Equation,
    postponed: Sequence[Postponed],
    variables: Sequence[Tensor],
    slots: Sequence[Sequence[Tensor]],
) -> None:
    """Clips and updates a kernel and its biases in one XLA program, the same for one shape."""
    import tensorflow as tf

    members = sorted(
        zip(postponed, variables, slots, strict=True), key=lambda member: bool(member[0].kernel)
    )

    def program(xs: Sequence[Tensor], handles: Sequence[Sequence[Tensor]]) -> None:
        norms: list[Tensor | None] = [None, None]
        for (of_variable, variable, _), x, own in zip(members, xs, handles, strict=True):
            weight, *old = (_read(handle, variable) for handle in own)
            if of_variable.clip:
                x, norm = of_variable.clip.clip(x, weight, norms[0])
                norms[0] = norms[0] if of_variable.kernel else norm
            x, new = equation(x, old)
            if of_variable.limit:
                x, norm = of_variable.limit.clip(x, weight, norms[1])
                norms[1] = norms[1] if of_variable.kernel else norm
            for handle, value in zip(own, (weight + x, *new), strict=True):
                tf.raw_ops.AssignVariableOp(resource=handle, value=value)

    xs = [of_variable.gradient for of_variable, _, _ in members]
    handles = [[v.handle for v in (variable, *own)] for _, variable, own in members]
    key = (variables[0].device, *(_kind(of_variable) for of_variable, _, _ in members))
    arithmetic.run_compiled(programs, key, program, xs, handles)


def _read(handle: Tensor, like: Tensor) -> Tensor:
    import tensorflow as tf

    value = tf.raw_ops.ReadVariableOp(resource=handle, dtype=like.dtype)
    value.set_shape(like.shape)
    return value


def _kind(postponed: Postponed) -> tuple[object, ...]:
    return tuple(part and part.key for part in (postponed.clip, postponed.limit))


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
