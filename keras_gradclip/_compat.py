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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, TypeVar

import keras
from keras.src.backend.common import global_state

# `keras.Model(inputs, outputs)` returns a `Functional`, whose class has no public name. A model
# that is both clipped and functional has to inherit from it.
from keras.src.models.functional import Functional as Functional
from keras.src.random import seed_generator

from keras_gradclip._types import Scalar, Strategy, Tensor

T = TypeVar("T")
# Keras 3.15 brought it; nothing is an instance of an empty tuple.
MultiOptimizer: type | tuple = getattr(keras.optimizers, "MultiOptimizer", ())


@contextlib.contextmanager
def changed(
    optimizer: keras.optimizers.Optimizer, methods: Mapping[str, Callable]
) -> Iterator[None]:
    """Replaces methods of an optimizer, of whatever class, within the context.

    Args:
        optimizer: the optimizer.
        methods: by name of a method, a function of (the method it replaces, its arguments).
            Names that the optimizer lacks are ignored.
    """
    new = {
        name: functools.partial(function, getattr(optimizer, name))
        for name, function in methods.items()
        if hasattr(optimizer, name)
    }
    own: dict[str, object] = optimizer.__dict__  # past `__setattr__`, which tracks
    before = {name: own[name] for name in new if name in own}
    own.update(new)
    try:
        yield
    finally:
        for name in new:
            own.pop(name, None)
        own.update(before)


#: Parts of an optimizer's update, of which none is public. The sum over the replicas: Keras has no
#: switch for it (Keras 2 had `experimental_aggregate_gradients`), and only TensorFlow has it.
REDUCE = "_all_reduce_sum_gradients"
#: The decoupled weight decay of a list of variables.
DECAY = "_apply_weight_decay"
#: The update of (gradients, variables, learning rate): on every backend, in replica context,
#: between weight decay and moving averages.
UPDATE = "_backend_update_step"
#: TensorFlow's part of that, of (strategy, pairs of a gradient and a native variable, learning
#: rate): in cross-replica context where there are replicas.
UPDATE_NATIVES = "_distributed_tf_update_step"
#: The copy of the moving averages into a list of variables.
OVERWRITE = "_overwrite_model_variables_with_average_value"


def build_with_all_tracked(optimizer: keras.optimizers.Optimizer, variables: list) -> None:
    """Build an optimizer so that everything that it remembers is saved.

    Nadam leaves a product to the tracking, which `LossScaleOptimizer.build` switches off.
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


def moving_averages(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]
) -> list[tuple[keras.Variable, keras.Variable]]:
    """Pairs of a variable and its moving average; without variables that have none.

    Keras pairs the variables that it is given with its list of averages by position: with a layer
    frozen since the build, a weight would get another's average.
    """
    averages = optimizer._model_variables_moving_average
    pairs = [(v, averages[optimizer._get_variable_index(v)]) for v in variables]
    return [(v, average) for v, average in pairs if average is not None]


def _callers() -> Iterator[object]:
    """What is called `self` in the functions that called the present one, innermost first."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(12):
        if frame is None:
            return
        yield frame.f_locals.get("self")
        frame = frame.f_back


def find_wrapping_loss_scale(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """The `LossScaleOptimizer` that is being constructed around `optimizer`, or None.

    `Model.compile` wraps every optimizer in one under `mixed_float16`, and tells the inner one
    nothing but `inner_optimizer.loss_scale_factor = None`: only the caller tells who it is.
    """
    for caller in _callers():
        is_one = isinstance(caller, keras.optimizers.LossScaleOptimizer)
        if is_one and getattr(caller, "inner_optimizer", None) is optimizer:
            return caller
    return None


def is_called_by(*kinds: type) -> bool:
    """Whether a method of one of these is among the callers.

    Keras's callbacks set `optimizer.learning_rate` as anybody does: only the caller tells that it
    is one more step of the same schedule.
    """
    return any(isinstance(caller, kinds) for caller in _callers())


def all_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """`model` and every layer inside it, at any depth.

    `model.layers` stops at the first level and misses the layers inside custom layers.
    """
    return list(model._flatten_layers(include_self=True, recursive=True))


def replace_optimizer(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> None:
    """Give a compiled model another optimizer, also in what it saves.

    `compile` again would need the arguments of a subclass's own `compile`, and `auto_scale_loss`,
    which Keras does not keep.
    """
    model.optimizer = optimizer
    if hasattr(model, "_compile_config"):
        model._compile_config.config["optimizer"] = optimizer
    model.train_function = None


def living_layers() -> list[keras.layers.Layer]:
    """Every layer that is alive, models included, whoever made it.

    Keras links layers to variables, never back, and keeps no list of layers; Python's garbage
    collector has one of all objects. `type(x)`: asking a proxy for its `__class__` may run code.
    """
    return [x for x in gc.get_objects() if issubclass(type(x), keras.layers.Layer)]


def own_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """The variables of a layer, less those of the layers inside, which `variables` has as well.

    Through `vars`, since a layer may be found while it is being made.
    """
    own = vars(layer)
    return [*own.get("_trainable_variables", ()), *own.get("_non_trainable_variables", ())]


def not_converted(function: Callable) -> Callable:
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


def build_what_counts(model: keras.Model, step: Callable, data: Tensor) -> None:
    """Make what the loss and the metrics of a compiled model count in, before its first step.

    As Keras does for strategies and on other backends. What a custom train step makes of the data
    only the step knows: it is traced once more, which builds its optimizer, too.
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


def means(metrics: Sequence[keras.metrics.Metric]) -> list[keras.metrics.Metric]:
    """The metrics that count what they have seen, at any depth: `Model.metrics` nests them."""
    found: list[keras.metrics.Metric] = []
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
    scope: Callable[..., AbstractContextManager], function: Callable, *args: object
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

    For the shapes of a batch Keras takes `strategy.reduce("MEAN", batch, axis=None)`, which fails
    across workers (keras#20585), and offers no public hook.
    """

    def _local_part(self, batch: Tensor) -> Tensor:
        """What this process has of a batch that workers share."""
        raise NotImplementedError  # ClippedTrainStep's, which the mixin is for

    def _spans_workers(self) -> bool:
        """Whether the model trains on several workers."""
        raise NotImplementedError  # ClippedTrainStep's, which the mixin is for

    def _maybe_symbolic_build(
        self, iterator: Iterable | None = None, data_batch: Tensor = None
    ) -> None:
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


def get_global_seed_generator() -> keras.random.SeedGenerator | None:
    """The generator that `keras.random` draws from without a seed; None until it first does.

    Keras has no public name for it, and only sets it, from a seed.
    """
    return global_state.get_global_attribute(seed_generator.GLOBAL_SEED_GENERATOR)


def set_global_seed_generator(generator: keras.random.SeedGenerator | None) -> None:
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


# Where Keras keeps what an update uses, in the order of TensorFlow's kernels; and the setting that
# turns it on, which may have changed since the optimizer was built.
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
    """What an update of a variable by an optimizer of `_SLOTS` uses; None if it was never made."""
    i = optimizer._get_variable_index(variable)
    lists: list[list[keras.Variable] | None] = [
        getattr(optimizer, name, None)
        for name, setting in _SLOTS[type(optimizer)].items()
        if setting is None or getattr(optimizer, setting)
    ]
    return [slot_list[i] for slot_list in lists if slot_list] if all(lists) else None


def shared_slots(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """What changes once an update and belongs to no variable: the running product of Nadam."""
    product = getattr(optimizer, "_u_product", None)
    return [] if product is None else [product]


def muon_uses_adamw(muon: keras.optimizers.Optimizer, variable: keras.Variable) -> bool:
    """Whether a built Muon leaves a variable to AdamW, of which no public name tells."""
    return muon._should_use_adamw(variable)


def updates_are_replaceable(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether `UPDATE_NATIVES` of an optimizer is Keras's own."""
    own = getattr(type(optimizer), UPDATE_NATIVES, None)
    return own is getattr(keras.optimizers.Optimizer, UPDATE_NATIVES, ())


def updates_are_separable(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether an update may be done in parts, some variables after others.

    Nadam's own `UPDATE` counts: it multiplies a product once a call.
    """
    return getattr(type(optimizer), UPDATE) is getattr(keras.optimizers.Optimizer, UPDATE)


def decay_by_one_rate(
    optimizer: keras.optimizers.Optimizer,
    default: Callable[..., None],
    variables: Sequence[keras.Variable],
) -> None:
    """`DECAY` of TensorFlow that multiplies the decay and the learning rate once.

    Keras takes both to each variable in turn, which costs a pass. An optimizer with a decay of its
    own (Muon) keeps it.
    """
    if getattr(type(optimizer), DECAY) is not getattr(keras.optimizers.Optimizer, DECAY):
        default(variables)
        return
    if optimizer.weight_decay is None:
        return
    import tensorflow as tf

    def of_one(variable: Tensor, rate: Scalar) -> None:
        if optimizer._use_weight_decay(variable):
            variable.assign_sub(variable * tf.cast(rate, variable.dtype))

    def merged(strategy: Strategy, variables: Sequence[Tensor], rate: Scalar) -> None:
        for variable in variables:
            strategy.extended.update(variable, of_one, args=(rate,), group=False)

    native = [v.value if isinstance(v, keras.Variable) else v for v in variables]
    # One product for all, in float32, or in float64 where a variable is.
    wide = "float64" if any(v.dtype == tf.float64 for v in native) else "float32"
    rate = tf.cast(optimizer.weight_decay, wide) * tf.cast(optimizer.learning_rate, wide)
    merge_call(merged, native, rate)


def merge_call(function: Callable[..., T], *args: object) -> T:
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
