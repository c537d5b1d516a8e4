"""The inner optimizer: its checks, and how it applies clipped gradients.

Adam and similar optimizers divide by the gradient's size, so clipping a gradient does not limit
their updates. A clipper whose `stage` is "update" then limits the weight update itself: after
decoupled weight decay, before moving averages and constraints.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import keras
from keras import ops

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip import _compat, aggregation
from keras_gradclip import _validation as validation
from keras_gradclip._types import Gradient, Gradients, Scalar, Strategy, Tensor
from keras_gradclip.names import path_of
from keras_gradclip.optimizer._compiled import CompiledUpdate

#: A function of (variables, their weight updates, the weights before) that returns the new weights.
Limiter = Callable[[Sequence[keras.Variable], Sequence[Tensor], Sequence[Tensor]], list[Tensor]]

#: Settings that Keras's base class has, so that setting them on the wrapper would do nothing.
OF_INNER = (
    *("clipnorm", "clipvalue", "global_clipnorm"),
    *("weight_decay", "use_ema", "ema_momentum", "ema_overwrite_frequency"),
)
SET_INNER = (
    "ClippedOptimizer: setting `{0}` here would do nothing. Set what is the inner optimizer's on "
    "`inner_optimizer`, and pass a clipper to clip."
)


def check_inner(inner: object, wrapper: type) -> keras.optimizers.Optimizer:
    """Returns the inner optimizer if `wrapper` can wrap it.

    Raises:
        ValueError: it clips, accumulates or scales by itself, or is not an optimizer.
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
    own = inner.stateless_apply  # type: ignore[attr-defined]
    keras_own = keras.optimizers.Optimizer.stateless_apply
    if keras.backend.backend() == "jax" and getattr(own, "__func__", None) is not keras_own:
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


def is_plain_sgd(inner: keras.optimizers.Optimizer) -> bool:
    """Whether the update is η·g (and momentum), so that the gradient can be limited in its place.

    True for SGD and for its subclasses that do not override the update.
    """
    sgd = keras.optimizers.SGD
    return isinstance(inner, sgd) and all(
        getattr(getattr(inner, name), "__func__", None) is getattr(sgd, name)
        for name in ("update_step", "apply", "apply_gradients")
    )


class Conditionally:
    """Updates the variables with a flag (`id` to a boolean scalar) only if it is true."""

    def __init__(self, inner: keras.optimizers.Optimizer, flags: Mapping[int, Tensor]) -> None:
        self._inner = inner
        self._flags = flags

    def methods(self) -> dict[str, Callable[..., None]]:
        """The replacements of the inner optimizer's methods: see `_compat.changed`."""
        return {_compat.UPDATE: self._update, _compat.DECAY: self._decay}

    def _update(
        self,
        default: Callable[..., None],
        gradients: Gradients,
        variables: Sequence[keras.Variable],
        learning_rate: Scalar,
    ) -> None:
        flags = [self._flags.get(id(v)) for v in variables]
        triples = list(zip(gradients, variables, flags, strict=True))
        sure = [(g, v) for g, v, flag in triples if flag is None]
        shared = _compat.shared_slots(self._inner)
        before = [ops.copy(arithmetic.read(v)) for v in shared]
        if sure:
            default(*zip(*sure, strict=True), learning_rate)
        after = [ops.copy(arithmetic.read(v)) for v in shared]
        for g, v, flag in triples:
            if flag is not None:
                aggregation.assign_each(shared, before)
                aggregation.cond(
                    flag,
                    lambda g, rate, v=v: default([g], [v], rate),
                    args=(g, learning_rate),
                    state=[v, *self._inner.variables],
                )
        aggregation.assign_each(shared, after)

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
    """Applies clipped gradients with an inner optimizer, which is modified only meanwhile.

    Meanwhile its own reduction is off and its updates use `compiled`, even if its class overrides
    the methods that are called.

    Attributes:
        compiled: how the inner optimizer's variables are updated.
        limited: `id` of the variables whose weight update may be limited.
        is_held: whether a `held` context is active.
    """

    def __init__(
        self, inner: keras.optimizers.Optimizer, strategy: Strategy | None, compiled: bool | str
    ) -> None:
        self._inner = inner
        self.compiled = CompiledUpdate(inner, compiled)
        self.limited: Collection[int] = ()
        self.is_held = False
        self._strategy = strategy
        self._entered = 0
        self._changes = contextlib.ExitStack()
        self._limits: dict[int, Limiter] = {}  # per replica, each a thread
        self._may_split = _compat.updates_are_separable(inner)

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Builds the inner optimizer; raises a ValueError if it was built without one of these."""
        if not self._inner.built:
            _compat.build_with_all_tracked(self._inner, list(variables))
            return
        unknown = [v for v in variables if not _compat.knows(self._inner, v)]
        if unknown:
            kind = type(self._inner).__name__
            raise ValueError(
                f"ClippedOptimizer: `inner_optimizer` ({kind}) was built without "
                f"{path_of(unknown[0])!r} and {len(unknown) - 1} other variables of "
                f"{len(variables)}, and has no state for them. After unfreezing a layer, pass a "
                f"new one: ClippedOptimizer({kind}(...), ...)."
            )

    def __call__(
        self,
        gradients: Gradients,
        variables: Sequence[keras.Variable],
        limit: Limiter | None = None,
        if_present: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Applies clipped gradients, or new values of variables that are overwritten.

        `limit` limits the weight updates before they are applied; for `if_present` see
        `Conditionally`.
        """
        if self.is_held:
            return
        factor = self._inner.loss_scale_factor
        if factor:  # Keras will divide again, and cannot divide a sparse gradient
            gradients = [None if g is None else arithmetic.dense(g) for g in gradients]
            gradients = arithmetic.divided(gradients, 1.0 / factor)
        with self._changed(limit, if_present or {}):
            # Keras's `apply_gradients` calls `apply`; either may be overridden.
            self._inner.apply_gradients(list(zip(gradients, variables, strict=True)))
        period = self._inner.ema_overwrite_frequency
        if self._strategy is not None and self._inner.use_ema and period:
            aggregation.cond(
                ops.equal(self._inner.iterations % period, 0),
                self._overwrite_in_training,
                cross_replica=True,
            )

    def finalize(self, variables: Sequence[keras.Variable]) -> None:
        """Finalises the weights as the inner optimizer does."""
        finalize = type(self._inner).finalize_variable_values
        if finalize is not keras.optimizers.Optimizer.finalize_variable_values:
            self._inner.finalize_variable_values(variables)
        elif self._inner.use_ema:
            self._overwrite_by_averages(variables)

    def _overwrite_in_training(self) -> None:
        """Overwrites all weights, also those without a gradient, and constrains them, as Keras."""
        variables = _compat.trainable_variables(self._inner)
        self._overwrite_by_averages(variables)
        assert self._strategy is not None
        for v in variables:
            if v.constraint is not None:
                self._strategy.extended.update(v.value, lambda x, v=v: x.assign(v.constraint(x)))

    def _overwrite_by_averages(self, variables: Sequence[keras.Variable]) -> None:
        for v, average in _compat.moving_averages(self._inner, variables):
            if self._strategy is None:
                v.assign(average)
            else:
                new = (average.value,)
                self._strategy.extended.update(v.value, lambda x, new: x.assign(new), args=new)

    @contextlib.contextmanager
    def _changed(self, limit: Limiter | None, if_present: Mapping[int, Tensor]) -> Iterator[None]:
        """Modifies the inner optimizer within the context.

        Replicas are threads that take turns: the first one to enter modifies it, and the last one
        to leave restores it.
        """
        inner, replica = self._inner, threading.get_ident()
        if limit is not None:
            self._limits[replica] = limit
        if self._entered == 0:
            # Gradients were reduced before the clip. Keras overwrites weights by their averages
            # inside a cond in replica context, which fails under a strategy; `__call__` does it.
            own: dict[str, Callable] = {_compat.REDUCE: lambda default, pairs: list(pairs)}
            if self._strategy is not None:
                own[_compat.OVERWRITE] = lambda default, variables: None
            limited = functools.partial(self._update_limited, not if_present)
            for methods in (
                own,
                self.compiled.methods(),
                Conditionally(inner, if_present).methods() if if_present else {},
                {_compat.UPDATE: limited} if limit else {},
            ):  # each builds on the previous change
                self._changes.enter_context(_compat.changed(inner, methods))
        self._entered += 1
        try:
            yield
        finally:
            self._limits.pop(replica, None)
            self._entered -= 1
            if self._entered == 0:
                self._changes.close()

    def _update_limited(
        self,
        is_whole: bool,
        default: Callable[..., None],
        gradients: Gradients,
        variables: Sequence[keras.Variable],
        learning_rate: Scalar,
    ) -> None:
        """Updates variables by `default`, and limits the updates of those with a limit.

        `is_whole`: no variable may be absent, for which only `default` is made.
        """
        limit = self._limits[threading.get_ident()]
        limited: list[tuple[Gradient, keras.Variable]] = []
        free: list[tuple[Gradient, keras.Variable]] = []
        for gradient, variable in zip(gradients, variables, strict=True):
            is_free = self._may_split and id(variable) not in self.limited
            (free if is_free else limited).append((gradient, variable))
        if limited:
            gradients, variables = map(list, zip(*limited, strict=True))
            changes = self.compiled.steps(gradients, variables, learning_rate) if is_whole else None
            if changes is None:
                self._limit_difference(default, limit, gradients, variables, learning_rate)
            else:
                before = [arithmetic.read(v) for v in variables]
                aggregation.assign_each(variables, limit(variables, changes, before))
        else:
            limit([], [], [])
        if free:
            default(*zip(*free, strict=True), learning_rate)

    def _limit_difference(
        self,
        default: Callable[..., None],
        limit: Limiter,
        gradients: Gradients,
        variables: Sequence[keras.Variable],
        learning_rate: Scalar,
    ) -> None:
        """Updates by `default`, and limits the difference that it has made."""
        before = [ops.copy(arithmetic.read(v)) for v in variables]
        default(gradients, variables, learning_rate)
        after = [arithmetic.read(v) for v in variables]
        if keras.backend.backend() == "torch":  # PyTorch updates in place
            after = [ops.copy(x) for x in after]
        aggregation.assign_each(variables, before)
        changes = [b - a for a, b in zip(before, after, strict=True)]
        limited = limit(variables, changes, before)
        aggregation.assign_each(
            variables,
            [
                # Without a clip, exactly the optimizer's own result.
                ops.where(ops.equal(result, old + change), new, result)
                for old, new, change, result in zip(before, after, changes, limited, strict=True)
            ],
        )

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A context in which traced updates do not change the weights."""
        self.is_held = True
        try:
            yield
        finally:
            self.is_held = False
