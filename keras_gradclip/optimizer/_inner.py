"""The inner optimizer: which one can be wrapped, and how it applies what was clipped."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
from keras import ops

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip import _compat, aggregation
from keras_gradclip import _validation as validation
from keras_gradclip._types import Gradients, Scalar, Strategy, Tensor
from keras_gradclip.optimizer._accumulation import is_overwritten
from keras_gradclip.optimizer._compiled import CompiledUpdate
from keras_gradclip.optimizer._steps import BoundedSteps, UpdateLimit


def check_inner(inner: object, wrapper: type) -> keras.optimizers.Optimizer:
    """The inner optimizer, if `wrapper` can wrap it.

    Raises:
        ValueError: it clips, accumulates or scales by itself, or is no optimizer.
    """
    if isinstance(inner, (str, dict)):
        inner = validation.made_of(wrapper.__name__, "inner_optimizer", inner, keras.optimizers.get)
    remedy = None
    if isinstance(inner, keras.optimizers.LossScaleOptimizer):
        remedy = (
            "wrap it the other way round: LossScaleOptimizer(ClippedOptimizer(inner, clipper)); "
            "under mixed_float16, compile does so by itself"
        )
    elif isinstance(inner, _compat.MultiOptimizer):
        remedy = (
            "each of its optimizers reduces, clips and accumulates for itself; write the "
            "MultiOptimizer around ClippedOptimizers instead, and compile a plain model with it"
        )
    elif isinstance(inner, wrapper):
        remedy = "use Chain([first, second]) to clip twice"
    elif not isinstance(inner, keras.optimizers.Optimizer):
        remedy = "pass a keras.optimizers.Optimizer such as keras.optimizers.AdamW(1e-3)"
    if remedy:
        kind = type(inner).__name__
        raise ValueError(
            f"ClippedOptimizer: `inner_optimizer` must not be {inner!r} ({kind}): {remedy}."
        )
    _check_arguments(inner)
    if keras.backend.backend() == "jax" and _compat.overrides(inner, "stateless_apply"):
        raise ValueError(
            f"ClippedOptimizer: `inner_optimizer` ({type(inner).__name__}) has a `stateless_apply` "
            "of its own, which would not be called. Override `apply` instead."
        )
    return inner


def _check_arguments(inner: keras.optimizers.Optimizer) -> None:
    kind = type(inner).__name__
    for argument, ours in (
        ("clipvalue", "AbsoluteClip({})"),
        ("clipnorm", "NormClip({}, scope='variable')"),
        ("global_clipnorm", "NormClip({}, scope='global')"),
    ):
        value = getattr(inner, argument, None)
        if value is not None:
            raise ValueError(
                f"ClippedOptimizer: `inner_optimizer` ({kind}) clips by itself, "
                f"{argument}={value!r}. Leave that out and use the clipper {ours.format(value)}."
            )
    steps = inner.gradient_accumulation_steps
    if steps:
        raise ValueError(
            f"ClippedOptimizer: `inner_optimizer` ({kind}) has "
            f"gradient_accumulation_steps={steps}, which would clip every micro-batch. Leave that "
            f"out and write ClippedOptimizer(..., gradient_accumulation_steps={steps})."
        )


def split_overwriting(
    gradients: Gradients, variables: Sequence[keras.Variable]
) -> tuple[Gradients, Gradients]:
    """Gradients, and the new values of variables that are overwritten by what comes for them."""
    overwritten = [is_overwritten(v) for v in variables]
    return (
        [None if o else g for g, o in zip(gradients, overwritten, strict=True)],
        [g if o else None for g, o in zip(gradients, overwritten, strict=True)],
    )


class Conditionally:
    """Updates some variables only where a flag says so, whatever the optimizer.

    Args:
        inner: a Keras optimizer.
        flags: `id` of a variable to a boolean scalar.
    """

    def __init__(self, inner: keras.optimizers.Optimizer, flags: Mapping[int, Tensor]) -> None:
        self._inner = inner
        self._flags = flags

    def attributes(self) -> dict[str, Any]:
        """What the inner optimizer has to be changed by while it applies: see `_compat.changed`."""
        return {
            **_compat.wrapped_update(self._inner, self._update),
            **_compat.wrapped_native_update(self._inner, self._update_natives),
            **_compat.wrapped_decay(self._inner, self._decay),
        }

    def _update(
        self,
        default: Callable[..., None],
        gradients: Gradients,
        variables: Sequence[keras.Variable],
        learning_rate: Scalar,
    ) -> None:
        flags = [self._flags.get(id(v)) for v in variables]
        triples = list(zip(gradients, variables, flags, strict=True))
        if aggregation.is_tensorflow():
            pairs = [g if flag is None else (g, flag) for g, _, flag in triples]
            default(pairs, variables, learning_rate)
            return
        sure = [(g, v) for g, v, flag in triples if flag is None]
        if sure:
            default(*zip(*sure, strict=True), learning_rate)
        for g, v, flag in triples:
            if flag is not None:
                aggregation.cond(
                    flag,
                    functools.partial(default, [g], [v], learning_rate),
                    lambda: None,
                    state=[v, *self._inner.variables],
                )

    def _update_natives(
        self,
        default: Callable[..., None],
        strategy: Strategy,
        pairs: Sequence[tuple[Any, Tensor]],
        learning_rate: Scalar,
    ) -> None:
        """On TensorFlow, in cross-replica context: the gradient of some is a pair with its flag."""
        sure = [pair for pair in pairs if not isinstance(pair[0], tuple)]
        if sure:
            default(strategy, sure, learning_rate)

        def of_one(variable: Tensor, gradient: Tensor, flag: Tensor, rate: Scalar) -> None:
            update = functools.partial(self._inner.update_step, gradient, variable, rate)
            aggregation.plain_cond(flag, update)

        for gradient, variable in pairs:
            if isinstance(gradient, tuple):
                arguments = (*gradient, learning_rate)
                strategy.extended.update(variable, of_one, args=arguments, group=False)

    def _decay(self, default: Callable[..., None], variables: Sequence[keras.Variable]) -> None:
        unsure = [v for v in variables if id(v) in self._flags]
        before = [ops.copy(arithmetic.read(v)) for v in unsure]
        default(variables)
        after = [
            ops.where(self._flags[id(v)], arithmetic.read(v), old)
            for v, old in zip(unsure, before, strict=True)
        ]
        aggregation.assign_each(unsure, after)


class InnerUpdate:
    """Applies clipped gradients by an inner optimizer, which is changed only meanwhile.

    Its own reduction is off and its updates go through `compiled`, also where it was entered by a
    method that its class overrides.

    Attributes:
        compiled: how the inner optimizer's variables are updated.
        is_held: whether it is inside `held`.
    """

    def __init__(
        self, inner: keras.optimizers.Optimizer, strategy: Strategy | None, compiled: bool | str
    ) -> None:
        self._inner = inner
        self.is_held = False
        self._is_distributed = strategy is not None
        self._overwrites_every: int | None = None
        self._entered = 0
        self._changes = contextlib.ExitStack()
        self.compiled = CompiledUpdate(inner, compiled)
        self._steps = BoundedSteps(inner, self.compiled.steps)

    def __call__(
        self,
        gradients: Gradients,
        overwriting: Gradients,
        variables: Sequence[keras.Variable],
        indices: Sequence[int],
        bound: UpdateLimit | None = None,
        if_present: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Apply.

        Args:
            gradients: clipped, one entry a variable.
            overwriting: new values, see `split_overwriting`.
            variables: all that the optimizer was built with.
            indices: the variables that this update is about.
            bound: what the steps go through before they stay.
            if_present: `id` of a variable to a boolean scalar, without which it stays as it is.
        """
        if self.is_held:
            return
        factor = self._inner.loss_scale_factor
        if factor:  # Keras will divide by it once more, and cannot divide a sparse gradient
            gradients = [None if g is None else arithmetic.dense(g) for g in gradients]
            gradients = arithmetic.divided(gradients, 1.0 / factor)
        merged = [g if o is None else o for g, o in zip(gradients, overwriting, strict=True)]
        chosen = [merged[i] for i in indices], [variables[i] for i in indices]
        with self._changed(if_present or {}), self._steps.by(bound):
            if _compat.overrides(self._inner, "apply_gradients"):
                self._inner.apply_gradients(list(zip(*chosen, strict=True)))
            else:
                self._inner.apply(*chosen)
        if self._overwrites_every:
            aggregation.cond(
                ops.equal(self._inner.iterations % self._overwrites_every, 0),
                functools.partial(_compat.overwrite_with_average, self._inner, chosen[1]),
                lambda: None,
                cross_replica=True,
            )

    @contextlib.contextmanager
    def _changed(self, if_present: Mapping[int, Tensor]) -> Iterator[None]:
        """Inside, the inner optimizer is changed for this update.

        Replicas are threads that take turns: the first that enters changes it, and the last that
        leaves puts it back.
        """
        if self._entered == 0:
            inner = self._inner
            changes = [lambda: _compat.without_reduction(inner), self.compiled.attributes]
            if if_present:
                changes.append(Conditionally(inner, if_present).attributes)
            changes.append(self._steps.attributes)  # each finds what the one before it has changed
            if self._is_distributed:
                # Keras overwrites weights with their averages inside a cond in replica context,
                # which fails, also where there is one replica alone; `__call__` does it.
                self._overwrites_every = inner.ema_overwrite_frequency
                changes.append(lambda: {"ema_overwrite_frequency": None})
            for attributes in changes:
                self._changes.enter_context(_compat.changed(inner, attributes()))
        self._entered += 1
        try:
            yield
        finally:
            self._entered -= 1
            if self._entered == 0:
                self._changes.close()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, what is traced leaves the weights as they are."""
        self.is_held = True
        try:
            yield
        finally:
            self.is_held = False
