"""The one place for names that Keras keeps to itself, or does not have in every version.

Each private name says why there is no public way, and `tests/test_compat.py` checks that it still
behaves as it is used here, so that a new Keras release fails with a plain message. What an older
Keras lacks is asked of the host, not of its version.
"""

from __future__ import annotations

import sys
from typing import Any

import keras

# `keras.Model(inputs, outputs)` returns a `Functional`, whose class has no public name. A model
# that is both clipped and functional has to inherit from it.
from keras.src.models.functional import Functional as Functional

# Keras 3.15 brought it; nothing is an instance of an empty tuple.
MultiOptimizer: Any = getattr(keras.optimizers, "MultiOptimizer", ())


def make_reduce_identity(optimizer: Any) -> None:
    """Stop `optimizer` from summing gradients over the replicas: its wrapper already did.

    Keras reduces in `TFOptimizer._all_reduce_sum_gradients`, after its own clipping, and has no
    public switch for it (Keras 2 had `experimental_aggregate_gradients`). On the other backends
    the method does not exist and nothing has to be done.
    """
    if hasattr(optimizer, "_all_reduce_sum_gradients"):
        optimizer._all_reduce_sum_gradients = list


def overwrite_with_average(optimizer: Any, variables: list) -> None:
    """Copy the moving averages into `variables`; to be called in cross-replica context.

    Keras does this inside a `cond` in replica context when `ema_overwrite_frequency` is set,
    which fails on more than one replica; the method itself is right in cross-replica context.
    """
    optimizer._overwrite_model_variables_with_average_value(variables)


def find_wrapping_loss_scale(optimizer: Any) -> Any:
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


def all_layers(model: Any) -> list[Any]:
    """`model` and every layer inside it, at any depth.

    `model.layers` stops at the first level and misses the layers inside custom layers.
    """
    return list(model._flatten_layers(include_self=True, recursive=True))


class LocalSymbolicBuild:
    """Mixin: builds a model under `MultiWorkerMirroredStrategy` from this worker's own batch.

    Before the first step Keras makes a stand-in for a batch, for its shapes alone, in
    `TensorFlowTrainer._maybe_symbolic_build`. From replicas it takes
    `strategy.reduce("MEAN", batch, axis=None)`, which fails across workers (keras#20585), and
    offers no public hook.
    """

    def _local_part(self, batch: Any) -> Any:
        """What this process has of a batch that workers share."""
        raise NotImplementedError

    def _spans_workers(self) -> bool:
        """Whether the model trains on several workers."""
        raise NotImplementedError

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
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
