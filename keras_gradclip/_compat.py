"""The one place for names that Keras keeps to itself, or does not have in every version.

Each private name says why there is no public way, and `tests/test_compat.py` checks that it still
behaves as it is used here, so that a new Keras release fails with a plain message. What an older
Keras lacks is asked of the host, not of its version.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras
from keras.src.backend.common import global_state

# `keras.Model(inputs, outputs)` returns a `Functional`, whose class has no public name. A model
# that is both clipped and functional has to inherit from it.
from keras.src.models.functional import Functional as Functional
from keras.src.random import seed_generator

from keras_gradclip._types import Scalar, Strategy, Tensor

# Keras 3.15 brought it; nothing is an instance of an empty tuple.
MultiOptimizer: Any = getattr(keras.optimizers, "MultiOptimizer", ())


@contextlib.contextmanager
def changed(optimizer: keras.optimizers.Optimizer, attributes: Mapping[str, Any]) -> Iterator[None]:
    """Set attributes of an object, of whatever class; put back what it had at the end."""
    own: dict[str, Any] = optimizer.__dict__  # past `__setattr__`, which tracks
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            own.pop(name, None)
        own.update(before)


def without_reduction(optimizer: keras.optimizers.Optimizer) -> dict[str, Any]:
    """Attributes for `changed`: sum no gradients over the replicas, for the wrapper already did.

    Keras reduces in `TFOptimizer._all_reduce_sum_gradients`, after its own clipping, and has no
    public switch for it (Keras 2 had `experimental_aggregate_gradients`). On the other backends
    the method does not exist and nothing has to be done.
    """
    name = "_all_reduce_sum_gradients"
    return {name: list} if hasattr(optimizer, name) else {}


def overrides(optimizer: keras.optimizers.Optimizer, name: str) -> bool:
    """Whether its class, or the object itself, has a method that Keras's base class has, too."""
    base = getattr(keras.optimizers.Optimizer, name)
    return name in vars(optimizer) or getattr(type(optimizer), name) is not base


def build_with_all_tracked(optimizer: keras.optimizers.Optimizer, variables: list) -> None:
    """Build an optimizer so that everything that it remembers is saved.

    `LossScaleOptimizer.build` switches the tracking off for what it builds inside, and Nadam
    leaves a product of its coefficients to the tracking: under mixed_float16 it is not saved.
    """
    optimizer.build(variables)
    known = {id(v) for v in [*optimizer.variables, *variables]}
    for value in vars(optimizer).values():
        if isinstance(value, keras.Variable) and id(value) not in known:
            optimizer._track_variable(value)


def knows(optimizer: keras.optimizers.Optimizer, variable: keras.Variable) -> bool:
    """Whether a built optimizer has state for a variable; no public method tells."""
    return optimizer._var_key(variable) in optimizer._trainable_variables_indices


def trainable_variables(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """The variables that an optimizer was built with; none before."""
    return list(optimizer._trainable_variables)


def averages_of(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]
) -> dict[str, Any]:
    """Attributes for `changed`: the moving averages of these variables alone, in their order.

    Keras pairs the variables that it is given with its list of averages by place: with a layer
    frozen since the build, a weight would get another's average.
    """
    name = "_model_variables_moving_average"
    averages = getattr(optimizer, name, None)
    if averages is None:
        return {}
    return {name: [averages[optimizer._get_variable_index(v)] for v in variables]}


def overwrite_with_average(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]
) -> None:
    """Copy the moving averages into the variables; to be called in cross-replica context.

    Keras does this inside a `cond` in replica context when `ema_overwrite_frequency` is set,
    which fails on more than one replica; the method itself is right in cross-replica context.
    """
    with changed(optimizer, averages_of(optimizer, variables)):
        optimizer._overwrite_model_variables_with_average_value(list(variables))


def find_wrapping_loss_scale(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """The `LossScaleOptimizer` that is being constructed around `optimizer`, or None.

    `Model.compile` wraps every optimizer in `LossScaleOptimizer` under `mixed_float16` and tells
    the inner one nothing but `inner_optimizer.loss_scale_factor = None`. The assignment is our
    only chance to learn who wraps us, so look for it among the callers' `self`.
    """
    frame: Any = sys._getframe(1)
    for _ in range(12):
        if frame is None:
            return None
        caller = frame.f_locals.get("self")
        if (
            isinstance(caller, keras.optimizers.LossScaleOptimizer)
            and getattr(caller, "inner_optimizer", None) is optimizer
        ):
            return caller
        frame = frame.f_back
    return None


def all_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """`model` and every layer inside it, at any depth.

    `model.layers` stops at the first level and misses the layers inside custom layers.
    """
    return list(model._flatten_layers(include_self=True, recursive=True))


def replace_optimizer(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> None:
    """Give a compiled model another optimizer, also in what it saves.

    Keras saves what `compile` was given, in `_compile_config`, and has no public way to change one
    part of it. `compile` again would need the arguments of a subclass's own `compile`, and
    `auto_scale_loss`, which Keras does not keep.
    """
    model.optimizer = optimizer
    if hasattr(model, "_compile_config"):
        model._compile_config.config["optimizer"] = optimizer
    model.train_function = None


def is_called_by(*kinds: type) -> bool:
    """Whether a method of one of these is among the callers.

    Keras's callbacks set `optimizer.learning_rate` as anybody does: only the caller tells that it
    is one more step of the same schedule.
    """
    frame: Any = sys._getframe(1)
    for _ in range(8):
        if frame is None:
            return False
        if isinstance(frame.f_locals.get("self"), kinds):
            return True
        frame = frame.f_back
    return False


def living_layers() -> list[keras.layers.Layer]:
    """Every layer that is alive, models included, whoever made it.

    Keras links layers to variables, never back, and keeps no list of layers. Python's garbage
    collector has one of all objects (`gc.get_objects`), and looking through it once (40 ms beside
    TensorFlow) finds layers that were made before this package was imported, too, which a hook in
    `Layer` would miss. `type(x)`, since asking a proxy for its `__class__` may run its code.
    """
    return [x for x in gc.get_objects() if issubclass(type(x), keras.layers.Layer)]


def own_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """The variables of a layer, less those of the layers inside, which `variables` has as well.

    Through `vars`, since a layer may be found while it is being made.
    """
    own = vars(layer)
    return [*own.get("_trainable_variables", ()), *own.get("_non_trainable_variables", ())]


def not_converted(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which AutoGraph leaves as it is, as it leaves Keras's own."""
    if keras.backend.backend() != "tensorflow":
        return function
    import tensorflow as tf

    return tf.autograph.experimental.do_not_convert(function)


def own_layers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The layers directly inside a layer; only models have a public list of them."""
    return list(vars(layer).get("_layers", ()))


def states(model: keras.Model) -> list[keras.Variable]:
    """What the layers of a model keep for themselves: batch statistics, states, random states.

    Not the weights of frozen layers, which `non_trainable_variables` has, too.
    """
    found: dict[int, keras.Variable] = {}
    for layer in all_layers(model):
        own = [*layer._non_trainable_variables, *(g.state for g in layer._seed_generators)]
        found.update({id(v): v for v in own})
    return list(found.values())


def build_what_counts(model: keras.Model, step: Callable[..., Any], data: Tensor) -> None:
    """Make what the loss and the metrics of a compiled model count in, before its first step.

    Keras does so for strategies and on other backends, by `_symbolic_build`, and has no public
    name for it. What a custom train step makes of the data, and which variables it trains, only
    the step knows: it is traced once more, which builds its optimizer, too.
    """
    parts = (model._compile_loss, model._compile_metrics)
    are_built = all(part is None or part.built for part in parts)
    if type(model).train_step is keras.Model.train_step:
        if not are_built:
            model._symbolic_build(data_batch=data)
        return
    if are_built and model.optimizer.built:
        return
    import tensorflow as tf

    tf.function(step, autograph=False).get_concrete_function(data)


def means(metrics: Sequence[Any]) -> list[Any]:
    """The metrics that count what they have seen, at any depth: `Model.metrics` nests them."""
    found: list[Any] = []
    for metric in metrics:
        found += [metric] if isinstance(metric, keras.metrics.Mean) else []
        found += means(getattr(metric, "metrics", None) or [])
    return found


def build_under(scope: Callable[..., AbstractContextManager], model: keras.Model) -> None:
    """Let a compiled `model` make what its loss and metrics count in under `scope()`.

    Keras makes it where the first step is traced, by `build` of `CompileLoss` and
    `CompileMetrics`, which a model keeps to itself, and has no hook.
    """
    for part in (model._compile_loss, model._compile_metrics):
        if part is not None:
            part.build = functools.partial(_call_under, scope, part.build)


def _call_under(
    scope: Callable[..., AbstractContextManager], function: Callable, *args: Any
) -> None:
    with scope():
        function(*args)


def method_that_applies(loss_scale: keras.optimizers.Optimizer) -> str:
    """The method of a `LossScaleOptimizer` to replace: `apply`, or what one of its own calls.

    A subclass that overrides `apply` calls Keras's, which on TensorFlow calls `_tf_apply`; there
    is no public method between the two.
    """
    is_own = type(loss_scale).apply is not keras.optimizers.LossScaleOptimizer.apply
    return "_tf_apply" if is_own and hasattr(loss_scale, "_tf_apply") else "apply"


class LocalSymbolicBuild:
    """Mixin: builds a model under `MultiWorkerMirroredStrategy` from this worker's own batch.

    Before the first step Keras makes a stand-in for a batch, for its shapes alone, in
    `TensorFlowTrainer._maybe_symbolic_build`. From replicas it takes
    `strategy.reduce("MEAN", batch, axis=None)`, which fails across workers (keras#20585), and
    offers no public hook.
    """

    def _local_part(self, batch: Tensor) -> Tensor:
        """What this process has of a batch that workers share."""
        raise NotImplementedError  # ClippedTrainStep's, which the mixin is for

    def _spans_workers(self) -> bool:
        """Whether the model trains on several workers."""
        raise NotImplementedError  # ClippedTrainStep's, which the mixin is for

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Tensor = None) -> None:
        if iterator is not None and self._spans_workers():
            for _, _, batches in iterator:
                data_batch = self._local_part(next(batches))
                break
            iterator = None
        super()._maybe_symbolic_build(  # type: ignore[misc]
            iterator=iterator, data_batch=data_batch
        )


def is_traced_for_xla() -> bool:
    """Whether TensorFlow is tracing a function that XLA will compile (`jit_compile=True`).

    Some operations mean something else there: `ClipByValue` turns a NaN into a limit. TensorFlow
    marks the graph, or one around it, and has no public way to ask.
    """
    import tensorflow as tf
    from tensorflow.python.ops import control_flow_util

    return bool(control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))


def get_global_seed_generator() -> Any:
    """The generator that `keras.random` draws from without a seed; None until it first does.

    Keras has no public name for it, and only sets it, from a seed.
    """
    return global_state.get_global_attribute(seed_generator.GLOBAL_SEED_GENERATOR)


def set_global_seed_generator(generator: Any) -> None:
    """What `get_global_seed_generator` returned, in its place again."""
    global_state.set_global_attribute(seed_generator.GLOBAL_SEED_GENERATOR, generator)


@contextlib.contextmanager
def tensorflow_random_state() -> Iterator[None]:
    """Put back what TensorFlow draws from outside of functions: seeds of operations, the generator.

    `tf.random.set_seed` sets the first, and nothing public reads it. Kernels count their draws, so
    that a seed drawn again needs a new kernel. `tf.random.get_global_generator` makes the second.
    """
    from tensorflow.python.eager import context
    from tensorflow.python.ops import stateful_random_ops

    host, generator = context.context(), stateful_random_ops.global_generator
    seeds = getattr(host, "_rng", None)
    before = seeds and seeds.getstate()
    state = None if generator is None else generator.state.numpy()
    try:
        yield
    finally:
        stateful_random_ops.global_generator = generator
        if generator is not None:
            generator.state.assign(state)
        if seeds is not None and (host._rng is not seeds or seeds.getstate() != before):
            seeds.setstate(before)
            host._rng = seeds
            host.clear_kernel_cache()


def _adam_slots(adam: keras.optimizers.Optimizer) -> tuple[str, ...]:
    return ("_momentums", "_velocities", *(["_velocity_hats"] if adam.amsgrad else []))


# Where Keras keeps what an update by the present settings uses, in the order of TensorFlow's
# kernels. A setting may have changed since the optimizer was built.
_SLOTS: dict[type, Callable[[keras.optimizers.Optimizer], tuple[str, ...]]] = {
    keras.optimizers.SGD: lambda sgd: ("momentums",) if sgd.momentum else (),
    keras.optimizers.Adam: _adam_slots,
    keras.optimizers.AdamW: _adam_slots,
    keras.optimizers.Adamax: lambda _: ("_m", "_u"),
    keras.optimizers.Adadelta: lambda _: ("_accumulated_grads", "_accumulated_delta_vars"),
}


def slots(
    optimizer: keras.optimizers.Optimizer, variable: keras.Variable
) -> list[keras.Variable] | None:
    """What an update of a variable by an optimizer of `_SLOTS` uses; None if it was never made."""
    i = optimizer._get_variable_index(variable)
    lists: list[Any] = [
        getattr(optimizer, name, None) for name in _SLOTS[type(optimizer)](optimizer)
    ]
    return [slot_list[i] for slot_list in lists if slot_list] if all(lists) else None


def muon_uses_adamw(muon: keras.optimizers.Optimizer, variable: keras.Variable) -> bool:
    """Whether a built Muon leaves a variable to AdamW, of which no public name tells."""
    return muon._should_use_adamw(variable)


def updates_are_replaceable(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether `replaced_updates` knows how `optimizer` updates a list of variables."""
    name = "_distributed_tf_update_step"
    return getattr(type(optimizer), name, None) is getattr(keras.optimizers.Optimizer, name, ())


def replaced_updates(
    optimizer: keras.optimizers.Optimizer, update: Callable[..., None]
) -> dict[str, Any]:
    """Attributes for `changed`: `update(default, strategy, pairs, learning rate)` updates.

    Keras calls `_distributed_tf_update_step` with the native variables, in cross-replica context
    where there are replicas; it has no public name for more than one variable at a time.
    `default` is that method as it was; the pairs are of gradients and variables.

    Decoupled weight decay and the learning rate are multiplied once, too: Keras takes both to each
    variable in turn, which costs a pass. An optimizer with a decay of its own (Muon) keeps it.
    """
    default = optimizer._distributed_tf_update_step
    attributes: dict[str, Any] = {"_distributed_tf_update_step": functools.partial(update, default)}
    if type(optimizer)._apply_weight_decay is keras.optimizers.Optimizer._apply_weight_decay:
        attributes["_apply_weight_decay"] = functools.partial(_decay_weights, optimizer)
    return attributes


def wrapped_update(
    optimizer: keras.optimizers.Optimizer, update: Callable[..., None]
) -> dict[str, Any]:
    """Attributes for `changed`: `update(default, gradients, variables, learning rate)` updates.

    Every backend calls `_backend_update_step` in replica context, between decoupled weight decay
    and the moving averages; Keras has no public name for this moment. `default` is that method as
    it was.
    """
    return {"_backend_update_step": functools.partial(update, optimizer._backend_update_step)}


def wrapped_native_update(
    optimizer: keras.optimizers.Optimizer, update: Callable[..., None]
) -> dict[str, Any]:
    """Attributes for `changed`: as `replaced_updates`, but of any optimizer; none elsewhere."""
    default = getattr(optimizer, "_distributed_tf_update_step", None)
    if default is None:
        return {}
    return {"_distributed_tf_update_step": functools.partial(update, default)}


def wrapped_decay(
    optimizer: keras.optimizers.Optimizer, decay: Callable[..., None]
) -> dict[str, Any]:
    """Attributes for `changed`: `decay(default, variables)` does the decoupled weight decay."""
    return {"_apply_weight_decay": functools.partial(decay, optimizer._apply_weight_decay)}


def updates_are_separable(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether an update may be done in parts, some variables after others.

    Nadam's own `_backend_update_step` counts: it multiplies a product once a call.
    """
    name = "_backend_update_step"
    return getattr(type(optimizer), name) is getattr(keras.optimizers.Optimizer, name)


def _decay_weights(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]
) -> None:
    if optimizer.weight_decay is None:
        return
    import tensorflow as tf

    def of_one(variable: keras.Variable, rate: Scalar) -> None:
        if optimizer._use_weight_decay(variable):
            variable.assign_sub(variable * tf.cast(rate, variable.dtype))

    def merged(strategy: Strategy, variables: Sequence[keras.Variable], rate: Scalar) -> None:
        for variable in variables:
            strategy.extended.update(variable, of_one, args=(rate,), group=False)

    native = [v.value if isinstance(v, keras.Variable) else v for v in variables]
    # One product for all, in float32, or in float64 where a variable is.
    wide = "float64" if any(v.dtype == tf.float64 for v in native) else "float32"
    rate = tf.cast(optimizer.weight_decay, wide) * tf.cast(optimizer.learning_rate, wide)
    merge_call(merged, native, rate)


def merge_call(function: Callable[..., Any], *args: object) -> Any:
    """`function(strategy, *args)`, in which `strategy.extended.update` serves every replica.

    The public `merge_call` fails under strategies that have none, and inside of one.
    """
    import tensorflow as tf

    return tf.__internal__.distribute.interim.maybe_merge_call(
        function, tf.distribute.get_strategy(), *args
    )


def operations_without_xla(function: Any) -> list[str]:
    """Types of operations in a traced function that XLA cannot compile for this machine.

    XLA itself would say so only when the step runs. TensorFlow fills its registry, which has no
    public door, when it compiles for the first time.
    """
    import tensorflow as tf
    from tensorflow.python.framework import kernels

    with tf.init_scope():
        tf.function(lambda: tf.zeros(()), jit_compile=True)()
    device = "XLA_GPU_JIT" if tf.config.list_physical_devices("GPU") else "XLA_CPU_JIT"
    registry = kernels.get_all_registered_kernels().kernel
    registered = {kernel.op for kernel in registry if kernel.device_type == device}
    graph = function.graph.as_graph_def()
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    called = {f.signature.name for f in graph.library.function}
    return sorted({node.op for node in nodes} - registered - called - {"Placeholder"})
