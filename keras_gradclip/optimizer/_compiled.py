"""How the inner optimizer's update is run: by one kernel a variable, by XLA, or as Keras wrote it.

Keras writes an update as many operations, each a pass over the memory (Adam: about 15 a variable).
TensorFlow has the same equations as single kernels, on CPU and GPU, for the common optimizers:
they need no compilation and serve every strategy, for each replica updates its own copy. What has
no such kernel is compiled by XLA where that pays: the large variables alone. Adam's kernel takes
longer to begin than the few operations on a small variable: those are written out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import backend

from keras_gradclip import _compat
from keras_gradclip import _kernels as kernels
from keras_gradclip._deferred import AS_IT_IS, Deferred, Later
from keras_gradclip._names import path_of
from keras_gradclip._types import (
    Gradient,
    Gradients,
    Optimizer,
    Scalar,
    Strategy,
    Tensor,
    Variable,
)
from keras_gradclip.optimizer._fused import FusedUpdate

#: One update of one variable: (variable, gradient, *slots), each of them native.
Kernel = Callable[..., Tensor]
#: (optimizer, learning rate, number of the step from 1 on): scalars of the variables' dtype.
MakeKernel = Callable[[Optimizer, Tensor, Tensor], Kernel]


def _sgd(inner: Optimizer, lr: Tensor, step: Tensor) -> Kernel:
    import tensorflow as tf

    del step
    if inner.momentum == 0:
        return lambda v, g: tf.raw_ops.ResourceApplyGradientDescent(var=v, alpha=lr, delta=g)
    momentum = tf.cast(inner.momentum, lr.dtype)
    return lambda v, g, m: tf.raw_ops.ResourceApplyKerasMomentum(
        var=v, accum=m, lr=lr, grad=g, momentum=momentum, use_nesterov=inner.nesterov
    )


def _betas(inner: Optimizer, lr: Tensor, step: Tensor) -> dict[str, Tensor]:
    import tensorflow as tf

    named = {"beta1": inner.beta_1, "beta2": inner.beta_2, "epsilon": inner.epsilon}
    constants = {name: tf.cast(value, lr.dtype) for name, value in named.items()}
    return {**constants, "lr": lr, "beta1_power": tf.pow(constants["beta1"], step)}


def _adam(inner: Optimizer, lr: Tensor, step: Tensor) -> Kernel:
    import tensorflow as tf

    constants = _betas(inner, lr * _rounding_of_beta_2(inner.beta_2, step), step)
    constants["beta2_power"] = tf.pow(constants["beta2"], step)
    if inner.amsgrad:
        return lambda v, g, m, s, top: tf.raw_ops.ResourceApplyAdamWithAmsgrad(
            var=v, m=m, v=s, vhat=top, grad=g, **constants
        )
    return lambda v, g, m, s: tf.raw_ops.ResourceApplyAdam(var=v, m=m, v=s, grad=g, **constants)


def _rounding_of_beta_2(beta_2: float, step: Tensor) -> Tensor:
    """By how much the kernel's root of the second moment is off, as a factor.

    The kernel takes 1 - β2 from a rounded β2, Keras rounds the difference: for 0.999 in float32
    they are 1.3e-5 apart. After t steps so are the second moments, until (1 - β2)·t outgrows 1.
    """
    import tensorflow as tf

    kernels_own = 1.0 - step.dtype.as_numpy_dtype(beta_2)
    keras_own = step.dtype.as_numpy_dtype(1.0 - beta_2)

    def grown(rate: float) -> Tensor:
        return tf.math.expm1(step * tf.cast(math.log1p(-rate), step.dtype))

    if not 0.0 < keras_own < 1.0 or not 0.0 < kernels_own < 1.0:
        return tf.ones_like(step)
    return tf.sqrt(grown(kernels_own) / grown(keras_own))


def _adamax(inner: Optimizer, lr: Tensor, step: Tensor) -> Kernel:
    import tensorflow as tf

    constants = _betas(inner, lr, step)
    return lambda v, g, m, u: tf.raw_ops.ResourceApplyAdaMax(var=v, m=m, v=u, grad=g, **constants)


def _adadelta(inner: Optimizer, lr: Tensor, step: Tensor) -> Kernel:
    import tensorflow as tf

    del step
    rho, epsilon = tf.cast(inner.rho, lr.dtype), tf.cast(inner.epsilon, lr.dtype)
    return lambda v, g, squares, deltas: tf.raw_ops.ResourceApplyAdadelta(
        var=v, accum=squares, accum_update=deltas, lr=lr, rho=rho, epsilon=epsilon, grad=g
    )


#: Those whose equations are exactly those of a TensorFlow kernel, in Keras's own formulation.
_KERNELS: dict[type, MakeKernel] = {
    keras.optimizers.SGD: _sgd,
    keras.optimizers.Adam: _adam,
    keras.optimizers.AdamW: _adam,
    keras.optimizers.Adamax: _adamax,
    keras.optimizers.Adadelta: _adadelta,
}


# Element by element, in many operations. The others take norms or products of matrices, which XLA
# computes more slowly on a CPU than TensorFlow; of somebody's own optimizer nothing is known.
_GAIN_BY_XLA = (
    keras.optimizers.Adagrad,
    keras.optimizers.Ftrl,
    keras.optimizers.Lion,
    keras.optimizers.Nadam,
    keras.optimizers.RMSprop,
)


# The methods that a kernel does not call. Set on an object (on a class, it is another), they count.
_REPLACED = ("apply", "apply_gradients", "update_step", "assign", "assign_add", "assign_sub")


class CompiledUpdate:
    """Runs the updates of one inner optimizer; what it refuses is left to Keras.

    Args:
        inner: a Keras optimizer.
        mode: "auto" compiles what is legal and pays, True insists, False changes nothing.

    Attributes:
        mode: as given.

    Raises:
        ValueError: `mode` is True and nothing can be compiled; or, at the first update, one of
            the variables cannot.
    """

    def __init__(self, inner: Optimizer, mode: bool | str) -> None:
        self._inner = inner
        self.mode = mode
        self._make_kernel = _KERNELS.get(type(inner))
        self._fused = FusedUpdate(inner, may_write_out=mode == "auto")
        #: Path of a variable to the reason why Keras updates it.
        self._refused: dict[str, str] = {}
        self._reason = self._impossible()
        if self._reason and mode is True:
            raise ValueError(_cannot(self._reason))

    def attributes(self) -> dict[str, Any]:
        """What the inner optimizer has to be changed by while it applies: see `_compat.changed`."""
        reason = self._impossible()
        if reason:  # it may be new: a method that was set on the object since
            self._reason = reason
            return {}
        return _compat.replaced_updates(self._inner, self._update)

    def _impossible(self) -> str | None:
        """Why nothing can be compiled, as far as it is known before the first update."""
        name = type(self._inner).__name__
        if self.mode is False:
            return "compiled=False"
        if backend.backend() != "tensorflow":
            return f"the backend is {backend.backend()}, not tensorflow"
        if not _compat.updates_are_replaceable(self._inner):
            return f"{name} or this Keras has its own way to update a list of variables"
        own = [method for method in _REPLACED if method in vars(self._inner)]
        if own:
            return f"{own[0]} was set on this {name}"
        known = self._make_kernel is not None or type(self._inner) in _GAIN_BY_XLA
        if not known and self.mode == "auto":
            return f"{name} is not known to gain; compiled=True tries it"
        return None

    def __str__(self) -> str:
        """As `ClippedOptimizer.compiled` says."""
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
        """Update native variables in place of `default`, Keras's own function for it."""
        if _compat.is_traced_for_xla():  # the whole step is compiled, and this with it
            default(strategy, pairs, learning_rate)
            return
        chosen: list[tuple[Gradient, Tensor]] = []
        left: list[tuple[Gradient, Tensor]] = []
        for gradient, variable in pairs:
            reason = self._unfit(gradient, variable)
            (left if reason else chosen).append((gradient, variable))
            if reason:
                self._refuse(variable, reason)
        if self._make_kernel is not None:
            self._update_by_kernels(self._make_kernel, strategy, chosen, learning_rate)
        else:
            left += self._update_by_xla(strategy, chosen, learning_rate)
        if left:
            default(strategy, left, learning_rate)

    def may_wait(self, gradients: Gradients, variables: Sequence[Variable]) -> Later | None:
        """Which clips of this update may wait for it; None: not one."""
        import tensorflow as tf

        if self._make_kernel is None or tf.executing_eagerly() or self._impossible():
            return None
        if _compat.is_traced_for_xla():  # Keras does this update
            return None
        if any(_compat.slots(self._inner, v) is None for v in variables):
            return None
        return self._fused.may_wait(gradients, variables)

    def _unfit(self, gradient: Gradient, variable: Tensor) -> str | None:
        if kernels.is_sparse(gradient):
            return "sparse gradient"
        if variable.dtype.name not in ("float32", "float64"):
            return f"{variable.dtype.name}"
        if self._make_kernel is not None and _compat.slots(self._inner, variable) is None:
            return "setting changed after the build"  # Keras says what it lacks
        return None

    def _refuse(self, variable: Tensor, reason: str) -> None:
        path = path_of(variable)
        if self.mode is True:
            raise ValueError(_cannot(f"{reason} of {path}"))
        self._refused[path] = reason

    def _update_by_kernels(
        self,
        make: MakeKernel,
        strategy: Strategy,
        pairs: Sequence[tuple[Gradient, Tensor]],
        learning_rate: Scalar,
    ) -> None:
        import tensorflow as tf

        # The scalars are computed once on each device.
        made: dict[tuple[str, str], tuple[Tensor, Tensor, Kernel, Sequence[Tensor]]] = {}

        def of_one(
            variable: Tensor, gradient: Gradient | Deferred, slots: list[Tensor], rate: Scalar
        ) -> None:
            key = (variable.device, variable.dtype.name)
            if key not in made:
                step = tf.cast(kernels.read(self._inner.iterations) + 1, variable.dtype)
                rate = tf.cast(rate, variable.dtype)
                constants = self._fused.constants(rate, step)
                made[key] = (rate, step, make(self._inner, rate, step), constants)
            rate, step, kernel, constants = made[key]
            if self._fused.writes_out(variable) and not isinstance(gradient, Deferred):
                gradient = Deferred(gradient, AS_IT_IS, ())
            if isinstance(gradient, Deferred):
                folded = self._fused.folded(gradient, rate)
                if folded is not None:
                    gradient, kernel = folded[0], make(self._inner, folded[1], step)
                elif self._fused.takes(variable):
                    self._fused.run(gradient, variable, slots, constants)
                    return
                else:
                    gradient = gradient.now(variable.read_value())
            gradient = tf.cast(gradient, variable.dtype)
            kernel(variable.handle, gradient, *(slot.handle for slot in slots))

        rate = kernels.read(learning_rate)
        for gradient, variable in sorted(pairs, key=_follows):
            slots = [slot.value for slot in _compat.slots(self._inner, variable) or ()]
            strategy.extended.update(variable, of_one, args=(gradient, slots, rate), group=False)

    def _update_by_xla(
        self, strategy: Strategy, pairs: Sequence[tuple[Gradient, Tensor]], learning_rate: Scalar
    ) -> list[tuple[Gradient, Tensor]]:
        """Update the pairs that are worth compiling; return the others."""
        import tensorflow as tf

        least = 0 if self.mode is True else kernels.SMALL
        large = [pair for pair in pairs if pair[1].shape.num_elements() >= least]
        size = sum(variable.shape.num_elements() for _, variable in large)
        several = strategy.num_replicas_in_sync > 1
        copies = [strategy.experimental_local_results(variable) for _, variable in large[:1]]
        compilations = len(copies[0]) if copies else 1  # XLA's, one a device
        reason = None
        if tf.executing_eagerly():
            reason = "eager execution"
        elif size < kernels.WORTH_COMPILING * compilations and self.mode == "auto":
            reason = f"{size} elements in large variables are too few to pay for XLA"
        elif not several and len({variable.device for _, variable in large}) > 1:
            reason = "variables on several devices"
        rate = kernels.read(learning_rate)  # of a schedule on replicas: one each
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
        self._reason = None  # an eager step before this one may have had one

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

    def _xla_function(self, variables: Sequence[Tensor]) -> Any:
        """A tf.function of (gradients, learning rate): one program for variables of a device."""
        import tensorflow as tf

        def run(gradients: list[Tensor], rate: Scalar) -> None:
            for gradient, variable in zip(gradients, variables, strict=True):
                self._inner.update_step(gradient, variable, rate)

        return tf.function(run, jit_compile=True, autograph=False)


def _follows(pair: tuple[Gradient | Deferred, Tensor]) -> bool:
    """Whether what another clip has seen is needed for this one; with replicas, all alike."""
    gradient = getattr(pair[0], "values", (pair[0],))[0]
    return isinstance(gradient, Deferred) and gradient.rule.follows


def _cannot(reason: str) -> str:
    return (
        f"ClippedOptimizer: compiled=True, but the update cannot be compiled: {reason}. Use "
        "compiled='auto', which compiles what it can."
    )
