"""Everything that knows `tf.distribute`.

The functions here are called in replica context, as `optimizer.apply` is, and work under the
default strategy, `MirroredStrategy` and strategies without merge calls. On the other backends
there is one replica, and they do the plain thing: under JAX's `keras.distribution.DataParallel`
the gradients that come here are already those of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import backend, ops


def is_tensorflow() -> bool:
    """Whether Keras runs on TensorFlow."""
    return backend.backend() == "tensorflow"


def _is_traced_by_jax(x: Any) -> bool:
    """Whether `x` is a value that a compiled JAX step has not computed yet."""
    if backend.backend() != "jax":
        return False
    import jax

    return isinstance(x, jax.core.Tracer)


def current_strategy() -> Any:
    """The `tf.distribute` strategy in scope, or None where there is none."""
    if not is_tensorflow():
        return None
    import tensorflow as tf

    return tf.distribute.get_strategy() if tf.distribute.has_strategy() else None


def replica_count() -> int:
    """The number of replicas that train together (1 without a strategy)."""
    strategy = current_strategy()
    return 1 if strategy is None else strategy.num_replicas_in_sync


def check_replica_context() -> None:
    """Raise a ValueError outside `strategy.run`, where a strategy is in scope."""
    if not is_tensorflow():
        return
    import tensorflow as tf

    if tf.distribute.has_strategy() and tf.distribute.in_cross_replica_context():
        raise ValueError(
            "ClippedOptimizer: `apply` must be called in replica context, i.e. inside "
            "`strategy.run(step_fn, ...)`, not directly under `strategy.scope()`."
        )


def all_reduce_sum(grads: Sequence[Any]) -> list[Any]:
    """The gradients summed over the replicas, in one all-reduce; None entries stay None."""
    grads = list(grads)
    if replica_count() == 1:
        return grads
    import tensorflow as tf

    present = [i for i, g in enumerate(grads) if g is not None]
    reduced = tf.distribute.get_replica_context().all_reduce(
        tf.distribute.ReduceOp.SUM, [grads[i] for i in present]
    )
    for i, g in zip(present, reduced, strict=True):
        grads[i] = g
    return grads


def cond(
    flag: Any,
    true_fn: Callable[..., Any],
    false_fn: Callable[..., Any],
    args: tuple = (),
    *,
    state: Sequence[Any] = (),
    cross_replica: bool = False,
) -> None:
    """Run `true_fn(*args)` or `false_fn(*args)` for their side effects on variables.

    A plain `tf.cond` in replica context may not hold anything that merges the replicas, which
    every optimizer update does; so the condition is built in cross-replica context and its
    branches enter the replicas again. Everything that differs between replicas must come in
    through `args`: a closure would bring in the first replica's tensors.

    Args:
        flag: boolean scalar tensor, the same on every replica.
        true_fn: a function of `args`.
        false_fn: a function of `args`.
        args: a tuple of nested structures of tensors.
        state: every variable that the functions may write (needed on JAX alone).
        cross_replica: call the functions in cross-replica context instead, without `args`.
    """
    if _is_traced_by_jax(flag):
        _stateless_cond(flag, true_fn, false_fn, args, state)
        return
    if not is_tensorflow():
        (true_fn if bool(flag) else false_fn)(*args)
        return
    import tensorflow as tf

    strategy = current_strategy()
    if strategy is None or tf.__internal__.distribute.strategy_supports_no_merge_call():
        call_args = () if cross_replica else args
        tf.cond(flag, _no_result(true_fn, call_args), _no_result(false_fn, call_args))
        return

    def merged(distribution: Any, flag: Any, *args: Any) -> None:
        def branch(fn: Callable[..., Any]) -> Callable[[], None]:
            if cross_replica:
                return _no_result(fn, ())

            def in_replica(*args: Any) -> None:
                fn(*args)

            def call() -> None:
                distribution.extended.call_for_each_replica(in_replica, args=args)

            return call

        first = distribution.experimental_local_results(flag)[0]
        tf.cond(first, branch(true_fn), branch(false_fn))

    tf.distribute.get_replica_context().merge_call(merged, args=(flag, *args))


def local_cond(flag: Any, true_fn: Callable[[], Any], state: Sequence[Any]) -> None:
    """Run `true_fn()` if `flag`; it writes `state` alone and merges no replicas."""
    if _is_traced_by_jax(flag):
        _stateless_cond(flag, true_fn, lambda: None, (), state)
        return

    def branch(fn: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            fn()
            return ops.zeros(())

        return call

    ops.cond(flag, branch(true_fn), branch(lambda: None))


def _stateless_cond(
    flag: Any, true_fn: Any, false_fn: Any, args: tuple, state: Sequence[Any]
) -> None:
    """`cond` for a compiled JAX step: the branches return the new values of `state`."""
    before = [(v, v.value) for v in state]

    def branch(fn: Callable[..., Any]) -> Callable[[], list[Any]]:
        def call() -> list[Any]:
            with keras.StatelessScope(state_mapping=before) as scope:
                fn(*args)
            return [scope.get_current_value(v) for v in state]

        return call

    for v, new in zip(state, ops.cond(flag, branch(true_fn), branch(false_fn)), strict=True):
        v.assign(new)


def _no_result(fn: Callable[..., Any], args: tuple) -> Callable[[], None]:
    def call() -> None:
        fn(*args)

    return call


def local_variable(shape: Sequence[int], dtype: Any, name: str) -> Any:
    """A variable of zeros of which every replica keeps its own copy.

    Outside the replicas it reads as the sum of the copies, and that is what is saved.
    """
    return keras.Variable(
        initializer="zeros",
        shape=tuple(shape),
        dtype=dtype,
        trainable=False,
        aggregation="sum",
        synchronization="on_read",
        name=name,
    )
