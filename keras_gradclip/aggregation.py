"""Reductions, variables and conditions under `tf.distribute` strategies, and without one.

Unless documented otherwise, functions are called in replica context, like `optimizer.apply`, and
support no strategy, `MirroredStrategy`, `MultiWorkerMirroredStrategy` and strategies without merge
calls. The other backends have one replica: under JAX's `keras.distribution.DataParallel` the
gradients are already those of the whole batch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeGuard

import keras
import numpy as np
from keras import backend, ops

from keras_gradclip import _compat
from keras_gradclip._types import Gradients, Scalar, Strategy, Tensor


def _is_traced_by_jax(x: Tensor) -> bool:
    """Whether JAX is tracing the step that computes `x`."""
    if backend.backend() != "jax":
        return False
    import jax

    return isinstance(x, jax.core.Tracer)


def has_value(variable: keras.Variable) -> bool:
    """Whether a variable has a value outside of the step that is being traced.

    False while JAX traces, and for a variable that the current trace of TensorFlow created.
    """
    value = variable.value if isinstance(variable, keras.Variable) else variable
    if backend.backend() != "tensorflow":
        return not _is_traced_by_jax(value)
    import tensorflow as tf

    with tf.init_scope():
        return bool(getattr(value, "values", [value])[0].is_initialized())


def concrete_value(variable: keras.Variable) -> np.ndarray | None:
    """The present value of a variable, also while a step is traced; None if it has none."""
    if not has_value(variable):
        return None
    if backend.backend() != "tensorflow":
        return ops.convert_to_numpy(variable.value)
    import tensorflow as tf

    with tf.init_scope():
        return getattr(variable.value, "values", [variable.value])[0].numpy()


@contextlib.contextmanager
def outside_of_traces(variables: Sequence[keras.Variable] = ()) -> Iterator[None]:
    """A context that creates variables outside of the tf.function being traced, if possible.

    TensorFlow traces a function twice if it creates variables. It is not possible on replicas, or
    if new variables copy some of `variables` and these are not initialised yet.
    """
    if not can_leave_the_trace(variables):
        yield
        return
    import tensorflow as tf

    def create(next_creator: Callable[..., Tensor], **arguments: object) -> Tensor:
        # The traced function would capture variables even in an `init_scope`.
        return next_creator(**{**arguments, "experimental_enable_variable_lifting": False})

    with tf.init_scope(), tf.variable_creator_scope(create):
        yield


def can_leave_the_trace(variables: Sequence[keras.Variable] = ()) -> bool:
    """Whether variables can be created outside of the tf.function being traced."""
    if backend.backend() != "tensorflow" or current_strategy() is not None:
        return False
    import tensorflow as tf

    if tf.executing_eagerly():
        return False
    natives = [v.value if isinstance(v, keras.Variable) else v for v in variables]
    with tf.init_scope():
        return tf.executing_eagerly() and all(
            isinstance(v, tf.Variable) and v.is_initialized() for v in natives
        )


def current_strategy() -> Strategy | None:
    """The `tf.distribute` strategy in scope, or None."""
    if backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    return tf.distribute.get_strategy() if tf.distribute.has_strategy() else None


def check_strategy(strategy: Strategy | None) -> None:
    """Raises a ValueError for an unsupported tf.distribute strategy."""
    if strategy is None:
        return
    import tensorflow as tf

    refused = (
        tf.distribute.experimental.CentralStorageStrategy,
        tf.distribute.ParameterServerStrategy,
        tf.distribute.TPUStrategy,
    )
    if isinstance(strategy, refused):
        raise ValueError(
            f"ClippedOptimizer: {type(strategy).__name__} is not supported: every replica keeps a "
            "copy of the clip's state. Use MirroredStrategy or MultiWorkerMirroredStrategy."
        )


def spans_workers(strategy: Strategy | None) -> TypeGuard[Strategy]:
    """Whether `strategy` is a `MultiWorkerMirroredStrategy` over a cluster."""
    if strategy is None:
        return False
    import tensorflow as tf

    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return False
    cluster = strategy.cluster_resolver.cluster_spec().as_dict()
    return sum(len(cluster.get(job, ())) for job in ("chief", "worker")) > 1


def is_chief(strategy: Strategy | None) -> bool:
    """Whether this process writes the files: the task `chief`, or worker 0 if there is none.

    True without a cluster.
    """
    if not spans_workers(strategy):
        return True
    resolver = strategy.cluster_resolver
    job = "chief" if "chief" in resolver.cluster_spec().as_dict() else "worker"
    return (resolver.task_type, resolver.task_id) == (job, 0)


def gather_numbers(strategy: Strategy, number: float) -> list[float]:
    """The numbers of all workers, each once per replica; all workers have to call this."""
    import tensorflow as tf

    @tf.function
    def replica() -> Tensor:
        return tf.constant([number], tf.float64)

    return strategy.gather(strategy.run(replica), axis=0).numpy().tolist()


def make_step_function(
    model: keras.Model, step: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """A train or test function of several replicas, as `make_train_function` of Keras makes it.

    Keras's loop over `steps_per_execution` in the graph fails on merge calls ("must feed a value
    for placeholder"). On a cluster its `strategy.reduce("MEAN", v, axis=0)` fails on scalar logs;
    one all-reduce averages all logs here, so that all workers have the same.

    Returns:
        A function of an iterator that runs `steps_per_execution` steps and returns the last logs;
        it raises StopIteration or `tf.errors.OutOfRangeError` at the end of the data.
    """
    import tensorflow as tf

    strategy = model.distribute_strategy

    def one_step(data: Tensor) -> Tensor:
        # A part that is missing in a batch is an empty Optional.
        data = keras.tree.map_structure(
            lambda v: None if isinstance(v, tf.experimental.Optional) else v, data
        )
        return _mean_over_replicas(strategy, strategy.run(step, args=(data,)))

    one_step = tf.autograph.experimental.do_not_convert(one_step)  # as Keras does
    # A separate function: otherwise part of a step runs at the end of the data.
    fetch: Callable[[Iterator], Tensor] = next
    if not model.run_eagerly:
        one_step = tf.function(one_step, reduce_retracing=True, jit_compile=model.jit_compile)
        fetch = tf.function(lambda iterator: iterator.get_next(), reduce_retracing=True)

    def function(iterator: Iterator) -> Tensor:
        distributed = isinstance(iterator, tf.distribute.DistributedIterator)
        logs = None
        for _ in range(model.steps_per_execution):
            try:
                logs = one_step(fetch(iterator) if distributed else next(iterator))
            except (StopIteration, tf.errors.OutOfRangeError):
                if logs is None:
                    raise
                break  # the next call raises it again
        return logs

    return function


def _mean_over_replicas(strategy: Strategy, outputs: Tensor) -> Tensor:
    """A nested structure whose numbers are averaged over all replicas of all workers."""
    import tensorflow as tf

    result: list[Tensor] = []
    means: dict[int, Tensor] = {}
    for i, leaf in enumerate(keras.tree.flatten(outputs)):
        values = strategy.experimental_local_results(leaf)
        result.append(values[0])
        if all(
            isinstance(v, tf.Tensor)
            and (v.dtype.is_floating or v.dtype.is_integer)
            and v.shape.is_fully_defined()
            for v in values
        ):  # float64 represents every int32 and float32 exactly
            total = tf.add_n([tf.cast(v, tf.float64) for v in values])
            means[i] = tf.reshape(total / len(values), [-1])
    if means:
        mean = strategy.reduce("MEAN", tf.concat([*means.values()], axis=0), axis=None)
        parts = tf.split(mean, [int(m.shape[0]) for m in means.values()])
        for i, part in zip(means, parts, strict=True):
            like = result[i]
            result[i] = tf.cast(tf.reshape(part, like.shape), like.dtype)
    return keras.tree.pack_sequence_as(outputs, result)


def check_replica_context() -> None:
    """Raises a ValueError if a strategy is in scope, but not inside `strategy.run`."""
    import tensorflow as tf

    if tf.distribute.has_strategy() and tf.distribute.in_cross_replica_context():
        raise ValueError(
            "ClippedOptimizer: `apply` must be called in replica context, i.e. inside "
            "`strategy.run(step_fn, ...)`, not directly under `strategy.scope()`."
        )


def all_reduce_sum(grads: Gradients, strategy: Strategy | None) -> Gradients:
    """The gradients summed over the replicas in one all-reduce; None stays None.

    Raises:
        ValueError: there are several replicas, but the optimizer's `strategy` is None.
    """
    if backend.backend() != "tensorflow":
        return grads
    import tensorflow as tf

    if tf.distribute.get_strategy().num_replicas_in_sync == 1:
        return grads
    if strategy is None:
        raise ValueError(
            "ClippedOptimizer: it was created outside the strategy that its model trains "
            "under, and every replica would count its steps. Create it inside "
            "`strategy.scope()`."
        )
    present = [g for g in grads if g is not None]
    if spans_workers(strategy):
        # On a worker with one replica, a variable's value that is read inside a cond has no device
        # ("destinations can not be empty"), but its copy has. Elsewhere a copy would turn one
        # tensor captured by all replicas into N gradients.
        present = [tf.identity(g) for g in present]
    context = tf.distribute.get_replica_context()
    sums = iter(context.all_reduce(tf.distribute.ReduceOp.SUM, present))
    return [None if g is None else next(sums) for g in grads]


def all_reduce_max(values: Gradients, strategy: Strategy | None) -> Gradients:
    """The largest of each value over the replicas, element by element; None stays None."""
    if strategy is None or strategy.num_replicas_in_sync == 1:
        return values
    import tensorflow as tf

    gather = tf.distribute.get_replica_context().all_gather
    return [x if x is None else tf.reduce_max(gather(x[None], axis=0), axis=0) for x in values]


def only_with(gradients: Gradients) -> contextlib.AbstractContextManager:
    """A context whose operations run only in a step that computes gradients.

    Where the size of the data is unknown, TensorFlow begins one step more at its end, and runs
    whatever does not depend on the batch: counts would rise, in Keras too. The last gradient is
    the first that a backward pass computes, so that nothing waits for it.
    """
    if backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    last = next(g for g in reversed(gradients) if g is not None)
    return tf.control_dependencies([tf.convert_to_tensor(getattr(last, "values", last))])


def without_waiting() -> contextlib.AbstractContextManager:
    """A context inside `only_with` for operations that depend on gradients anyway.

    The many small ones before them (constants, reads of variables) then run at once.
    """
    if backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.control_dependencies(None)


def assign_each(variables: Sequence[keras.Variable], values: Sequence[Tensor]) -> None:
    """Assigns each replica's values to its own copies of the variables, without a reduction."""
    if backend.backend() != "tensorflow":
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
        return

    def merged(strategy: Strategy, natives: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        for native, value in zip(natives, values, strict=True):
            strategy.extended.update(native, _assign, args=(value,), group=False)

    natives = [v.value if isinstance(v, keras.Variable) else v for v in variables]
    _compat.merge_call(merged, natives, list(values))


def _assign(native: Tensor, value: Tensor) -> None:
    native.assign(value)


def cond(
    flag: Scalar,
    true_fn: Callable[..., None],
    false_fn: Callable[..., None] = lambda *args: None,
    args: tuple = (),
    *,
    state: Sequence[keras.Variable] = (),
    reads: Sequence[keras.Variable] = (),
    cross_replica: bool = False,
    merges: bool = True,
) -> None:
    """Calls `true_fn(*args)` or `false_fn(*args)` for their effects on variables.

    A `tf.cond` in replica context must not contain merge calls, which every optimizer update has.
    So the condition is built in cross-replica context, and its branches enter the replicas again.

    Args:
        flag: a boolean scalar, the same on every replica.
        true_fn: a function of `args`.
        false_fn: a function of `args`.
        args: nested structures of all tensors that differ between replicas: a closure would
            capture the first replica's.
        state: the variables that the functions may write (for JAX).
        reads: other variables that a function may read (for JAX).
        cross_replica: call the functions in cross-replica context, without `args`.
        merges: whether the functions may contain merge calls; if not, a `tf.cond` will do.
    """
    if _is_traced_by_jax(flag):
        _stateless_cond(flag, true_fn, false_fn, args, state, reads)
        return
    if backend.backend() != "tensorflow":
        # Not `ops.cond`: JAX traces its branches even in eager mode, and would assign tracers.
        (true_fn if bool(flag) else false_fn)(*args)
        return
    import tensorflow as tf

    strategy = current_strategy() if merges else None
    if strategy is None or tf.__internal__.distribute.strategy_supports_no_merge_call():
        call_args = () if cross_replica else args
        branches = [functools.partial(fn, *call_args) for fn in (true_fn, false_fn)]
        if not merges and not tf.executing_eagerly():
            # TensorFlow visits each operation of an inlined branch, also if it is not taken.
            branches = [
                tf.function(fn, autograph=False, experimental_attributes={"_noinline": True})
                for fn in branches
            ]
        tf.cond(flag, *branches)
        return

    def merged(distribution: Strategy, flag: Scalar, *args: Tensor) -> None:
        def branch(fn: Callable[..., None]) -> Callable[[], None]:
            if cross_replica:
                return fn
            return functools.partial(distribution.extended.call_for_each_replica, fn, args=args)

        first = distribution.experimental_local_results(flag)[0]
        tf.cond(first, branch(true_fn), branch(false_fn))

    tf.distribute.get_replica_context().merge_call(merged, args=(flag, *args))


def _stateless_cond(
    flag: Scalar,
    true_fn: Callable[..., None],
    false_fn: Callable[..., None],
    args: tuple,
    state: Sequence[keras.Variable],
    reads: Sequence[keras.Variable],
) -> None:
    """`cond` in a compiled JAX step, where the branches return the new values of `state`."""
    before = [(v, v.value) for v in (*state, *reads)]

    def branch(fn: Callable[..., None]) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            with keras.StatelessScope(state_mapping=before) as scope:
                fn(*args)
            return [scope.get_current_value(v) for v in state]

        return call

    for v, new in zip(state, ops.cond(flag, branch(true_fn), branch(false_fn)), strict=True):
        v.assign(new)


def zeros(
    shape: Sequence[int], name: str, dtype: str = "float32", **placement: str
) -> keras.Variable:
    """A variable of zeros; every replica writes the same value to its own copy."""
    return keras.Variable(
        initializer="zeros",
        shape=tuple(shape),
        dtype=dtype,
        trainable=False,
        name=name,
        **{"aggregation": "none", **placement},
    )


def counter(shape: Sequence[int], name: str) -> keras.Variable:
    """An integer variable of zeros, because a float32 counter would stop at 2^24."""
    return zeros(shape, name, "int32" if backend.backend() == "jax" else "int64")


def to_numpy(value: Tensor) -> Tensor:
    """A copy of a tensor or variable on the host."""
    if backend.backend() == "tensorflow" and hasattr(value, "numpy"):
        return value.numpy()  # also under MirroredStrategy, where `int(...)` raises
    return ops.convert_to_numpy(value)


def local_variable(shape: Sequence[int], dtype: str, name: str) -> keras.Variable:
    """A variable of zeros with a separate value for each replica; their sum is saved."""
    return zeros(shape, name, dtype, aggregation="sum", synchronization="on_read")
