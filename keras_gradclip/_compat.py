"""Private names of Keras and TensorFlow, and public ones that not every Keras version has.

Each says why no public name would do. `tests/test_compat.py` checks them, so that a new Keras
release fails with a clear message.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, TypeVar

import keras
from keras.src.backend.common import global_state

# The class of `keras.Model(inputs, outputs)`, which has no public name, is a base of clipped
# functional models.
from keras.src.models.functional import Functional as Functional

# Whether the arguments of `keras.Model` are inputs and outputs.
from keras.src.models.model import functional_init_arguments as functional_init_arguments

from keras_gradclip._types import Scalar, Strategy, Tensor

T = TypeVar("T")
# New in Keras 3.15; nothing is an instance of an empty tuple.
MultiOptimizer: type | tuple = getattr(keras.optimizers, "MultiOptimizer", ())
# Where Keras keeps the generator of `keras.random` without a seed; it has a constant since 3.13.
_GLOBAL_SEED_GENERATOR = "global_seed_generator"


@contextlib.contextmanager
def changed(
    optimizer: keras.optimizers.Optimizer, methods: Mapping[str, Callable]
) -> Iterator[None]:
    """Replaces methods of an optimizer of any class within the context.

    `methods` maps the name of a method to a function of (the replaced method, its arguments); names
    that the optimizer lacks are ignored.
    """
    new = {
        name: functools.partial(function, getattr(optimizer, name))
        for name, function in methods.items()
        if hasattr(optimizer, name)
    }
    own: dict[str, object] = optimizer.__dict__  # `__setattr__` would track them
    before = {name: own[name] for name in new if name in own}
    own.update(new)
    try:
        yield
    finally:
        for name in new:
            own.pop(name, None)
        own.update(before)


# The steps of an optimizer's update are private methods.
#: The sum over replicas, on TensorFlow; no argument turns it off.
REDUCE = "_all_reduce_sum_gradients"
#: The decoupled weight decay of a list of variables.
DECAY = "_apply_weight_decay"
#: The update of (gradients, variables, learning rate), in replica context, between weight decay and
#: moving averages.
UPDATE = "_backend_update_step"
#: The part of `UPDATE` on TensorFlow, of (strategy, pairs of a gradient and a native variable,
#: learning rate), in cross-replica context under a strategy.
UPDATE_NATIVES = "_distributed_tf_update_step"
#: The assignment of moving averages to a list of variables.
OVERWRITE = "_overwrite_model_variables_with_average_value"


def build_with_all_tracked(optimizer: keras.optimizers.Optimizer, variables: list) -> None:
    """Builds an optimizer and tracks all its variables, so that they are saved.

    `LossScaleOptimizer.build` disables the automatic tracking, which Nadam needs for `_u_product`.
    """
    optimizer.build(variables)
    known = {id(v) for v in [*optimizer.variables, *variables]}
    for value in vars(optimizer).values():
        if isinstance(value, keras.Variable) and id(value) not in known:
            optimizer._track_variable(value)


def knows(optimizer: keras.optimizers.Optimizer, variable: keras.Variable) -> bool:
    """Whether a built optimizer has state for a variable; there is no public method."""
    return optimizer._var_key(variable) in optimizer._trainable_variables_indices


def trainable_variables(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """The variables that an optimizer was built with."""
    return list(optimizer._trainable_variables)


def moving_averages(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]
) -> list[tuple[keras.Variable, keras.Variable]]:
    """Pairs of a variable and its moving average, for variables that have one.

    Keras pairs a list of variables with its averages by position, which is wrong once a layer is
    frozen after the build.
    """
    averages = optimizer._model_variables_moving_average
    pairs = [(v, averages[optimizer._get_variable_index(v)]) for v in variables]
    return [(v, average) for v, average in pairs if average is not None]


def _callers() -> Iterator[object]:
    """The variable `self` of each of the last 12 calling functions, innermost first."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(12):
        if frame is None:
            return
        yield frame.f_locals.get("self")
        frame = frame.f_back


def find_wrapping_loss_scale(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """The `LossScaleOptimizer` that is being constructed around `optimizer`, or None.

    Its constructor only sets `inner_optimizer.loss_scale_factor = None`, so it is looked for among
    the callers of that.
    """
    for caller in _callers():
        is_one = isinstance(caller, keras.optimizers.LossScaleOptimizer)
        if is_one and getattr(caller, "inner_optimizer", None) is optimizer:
            return caller
    return None


def is_called_by(*kinds: type) -> bool:
    """Whether a method of one of these classes is among the callers.

    Keras's callbacks set `optimizer.learning_rate` like users, but continue a schedule.
    """
    return any(isinstance(caller, kinds) for caller in _callers())


def all_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """`model` and all its layers at any depth; `model.layers` lacks those inside other layers."""
    return list(model._flatten_layers(include_self=True, recursive=True))


def replace_optimizer(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> None:
    """Replaces the optimizer of a compiled model, also in its saved config.

    Calling `compile` again would need `auto_scale_loss` and a subclass's own arguments, which
    Keras does not store.
    """
    model.optimizer = optimizer
    if hasattr(model, "_compile_config"):
        model._compile_config.config["optimizer"] = optimizer
    model.train_function = None


def living_layers() -> list[keras.layers.Layer]:
    """All layers and models in memory, from the garbage collector: Keras has no list of them."""
    # `isinstance` may run the code of a proxy object.
    return [x for x in gc.get_objects() if issubclass(type(x), keras.layers.Layer)]


def own_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """The variables of a layer without those of its sublayers."""
    own = vars(layer)  # the layer may still be under construction
    return [*own.get("_trainable_variables", ()), *own.get("_non_trainable_variables", ())]


def not_converted(function: Callable) -> Callable:
    """`function` without conversion by AutoGraph, like Keras's own functions."""
    if keras.backend.backend() != "tensorflow":
        return function
    import tensorflow as tf

    return tf.autograph.experimental.do_not_convert(function)


def own_layers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The direct sublayers of a layer; only models have a public list."""
    return list(vars(layer).get("_layers", ()))


def states(model: keras.Model) -> list[keras.Variable]:
    """The batch statistics, recurrent states and random states of a model's layers.

    `non_trainable_variables` also has the weights of frozen layers.
    """
    found: dict[int, keras.Variable] = {}
    for layer in all_layers(model):
        own = [*layer._non_trainable_variables, *(g.state for g in layer._seed_generators)]
        found.update({id(v): v for v in own})
    return list(found.values())


def build_metrics(model: keras.Model, step: Callable, data: Tensor) -> None:
    """Creates the variables of a compiled model's loss and metrics before its first step.

    Keras does so under strategies and on other backends. A custom train step may change the data,
    so it is traced once more, which also builds the optimizer.
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


def build_under(scope: contextlib.ContextDecorator, model: keras.Model) -> None:
    """Lets a compiled model create the variables of its loss and metrics within `scope`.

    Keras creates them while it traces the first step, in `build` of two private attributes.
    """
    for part in (model._compile_loss, model._compile_metrics):
        if part is not None:
            part.build = scope(part.build)


def method_that_applies(loss_scale: keras.optimizers.Optimizer) -> str:
    """The method of a `LossScaleOptimizer` to replace: `apply`, or `_tf_apply` of a subclass.

    A subclass may override `apply` and call Keras's, which calls `_tf_apply` on TensorFlow.
    """
    is_own = type(loss_scale).apply is not keras.optimizers.LossScaleOptimizer.apply
    return "_tf_apply" if is_own and hasattr(loss_scale, "_tf_apply") else "apply"


class LocalSymbolicBuild:
    """Mixin that builds a model of several workers from this worker's part of a batch.

    Keras builds it from `strategy.reduce("MEAN", batch, axis=None)`, which fails across workers
    (keras#20585), and has no public hook.
    """

    def _local_batch(self, iterator: Iterable) -> Tensor:
        """The worker's part of the first batch; None without other workers."""
        raise NotImplementedError  # abstract: ClippedTrainStep's

    def _maybe_symbolic_build(
        self, iterator: Iterable | None = None, data_batch: Tensor = None
    ) -> None:
        local = None if iterator is None else self._local_batch(iterator)
        if local is not None:
            iterator, data_batch = None, local
        super()._maybe_symbolic_build(  # type: ignore[misc]
            iterator=iterator, data_batch=data_batch
        )


def is_traced_for_xla() -> bool:
    """Whether TensorFlow is tracing a function with `jit_compile=True`; no public name says so.

    Some operations differ in XLA: `ClipByValue` turns a NaN into a limit.
    """
    import tensorflow as tf
    from tensorflow.python.ops import control_flow_util

    return bool(control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))


def get_global_seed_generator() -> keras.random.SeedGenerator | None:
    """The generator of `keras.random` without a seed; None before its first use."""
    return global_state.get_global_attribute(_GLOBAL_SEED_GENERATOR)


def set_global_seed_generator(generator: keras.random.SeedGenerator | None) -> None:
    """Restores the result of `get_global_seed_generator`."""
    global_state.set_global_attribute(_GLOBAL_SEED_GENERATOR, generator)


@contextlib.contextmanager
def tensorflow_random_state() -> Iterator[None]:
    """Restores the seeds of TensorFlow's random operations, and its global generator.

    Nothing public reads the seeds, and `tf.random.get_global_generator` would create a generator.
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
            host.clear_kernel_cache()  # kernels count their draws


# The attributes with an optimizer's slots, in the order of TensorFlow's kernels, and the argument
# that enables each, which may have changed since the build.
_ADAM = {"_momentums": None, "_velocities": None, "_velocity_hats": "amsgrad"}
_SLOTS: dict[type, Mapping[str, str | None]] = {
    keras.optimizers.SGD: {"momentums": "momentum"},
    keras.optimizers.Adam: _ADAM,
    keras.optimizers.AdamW: _ADAM,
    keras.optimizers.Adamax: {"_m": None, "_u": None},
    keras.optimizers.Adadelta: {"_accumulated_grads": None, "_accumulated_delta_vars": None},
}


def slots(
    optimizer: keras.optimizers.Optimizer, variable: keras.Variable
) -> list[keras.Variable] | None:
    """The slots of a variable, for an optimizer in `_SLOTS`; None if one was never created."""
    i = optimizer._get_variable_index(variable)
    lists: list[Any] = [
        getattr(optimizer, name, None)
        for name, setting in _SLOTS[type(optimizer)].items()
        if setting is None or getattr(optimizer, setting)
    ]
    return [slot_list[i] for slot_list in lists] if all(lists) else None


def shared_slots(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """State of an optimizer that belongs to no variable: the running product of Nadam."""
    product = getattr(optimizer, "_u_product", None)
    return [] if product is None else [product]


def muon_uses_adamw(muon: keras.optimizers.Optimizer, variable: keras.Variable) -> bool:
    """Whether a built Muon updates a variable by AdamW; there is no public method."""
    return muon._should_use_adamw(variable)


def updates_are_replaceable(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether an optimizer's class does not override `UPDATE_NATIVES`."""
    own = getattr(type(optimizer), UPDATE_NATIVES, None)
    return own is getattr(keras.optimizers.Optimizer, UPDATE_NATIVES, ())


def updates_are_separable(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether an optimizer's variables may be updated in several calls of `UPDATE`.

    Nadam overrides it, to multiply a product once per call.
    """
    return getattr(type(optimizer), UPDATE) is getattr(keras.optimizers.Optimizer, UPDATE)


def decay_by_one_rate(
    optimizer: keras.optimizers.Optimizer,
    default: Callable[..., None],
    variables: Sequence[keras.Variable],
) -> None:
    """`DECAY` on TensorFlow that multiplies decay and learning rate once, not for each element.

    An optimizer that overrides `DECAY` (Muon) keeps its own.
    """
    if getattr(type(optimizer), DECAY) is not getattr(keras.optimizers.Optimizer, DECAY):
        default(variables)
        return
    import tensorflow as tf

    def of_one(variable: Tensor, rate: Scalar) -> None:
        if optimizer._use_weight_decay(variable):
            variable.assign_sub(variable * tf.cast(rate, variable.dtype))

    def merged(strategy: Strategy, variables: Sequence[Tensor], rate: Scalar) -> None:
        for variable in variables:
            strategy.extended.update(variable, of_one, args=(rate,), group=False)

    native = [v.value if isinstance(v, keras.Variable) else v for v in variables]
    wide = "float64" if any(v.dtype == tf.float64 for v in native) else "float32"
    rate = tf.cast(optimizer.weight_decay, wide) * tf.cast(optimizer.learning_rate, wide)
    merge_call(merged, native, rate)


def merge_call(function: Callable[..., T], *args: object) -> T:
    """`function(strategy, *args)`, where `strategy.extended.update` reaches every replica.

    The public `merge_call` fails under strategies without it, and inside another one.
    """
    import tensorflow as tf

    return tf.__internal__.distribute.interim.maybe_merge_call(
        function, tf.distribute.get_strategy(), *args
    )


def operations_without_xla(function: Any) -> list[str]:
    """The types of operations in a traced function that XLA cannot compile on this machine.

    XLA itself raises the error only when the step runs.
    """
    import tensorflow as tf
    from tensorflow.python.framework import kernels

    with tf.init_scope():  # the first compilation fills the registry
        tf.function(lambda: tf.zeros(()), jit_compile=True)()
    device = "XLA_GPU_JIT" if tf.config.list_physical_devices("GPU") else "XLA_CPU_JIT"
    registry = kernels.get_all_registered_kernels().kernel
    registered = {kernel.op for kernel in registry if kernel.device_type == device}
    graph = function.graph.as_graph_def()
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    called = {f.signature.name for f in graph.library.function}
    return sorted({node.op for node in nodes} - registered - called - {"Placeholder"})
