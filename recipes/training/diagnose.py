"""Finds the origin of a NaN: replays the last steps before a divergence."""

import dataclasses

import keras
import numpy as np
import tensorflow as tf

from keras_gradclip.names import layer_of
from recipes.training.callbacks import clipped_optimizer
from recipes.training.checkpoint import all_finite, restore, state_variables


@dataclasses.dataclass(frozen=True)
class Finding:
    """What the replay found.

    Attributes:
        step: int, zero-based step of the run at which the first non-finite value appeared.
        layer: str or None, the layer of the first non-finite gradient, in the order in which
            backpropagation meets them (output first).
        output_of: str or None, the first layer whose output is not finite, input first.
        message: str, all of it in one sentence.
    """

    step: int
    layer: str | None
    output_of: str | None
    message: str


def replay(model, backup: dict, batches, failed_step: int) -> Finding:
    """Goes back to the backup and repeats its steps up to the failed one.

    Costs as many steps as lie between the backup and the failure, and one eager pass.

    Args:
        model: the compiled model; its weights afterwards are those before the bad update.
        backup: from `load_backup`.
        batches: iterable of (x, y) from the backup's step on, as in the run.
        failed_step: int, step at which the run saw a loss or weight that is not finite.
    """
    restore(model, backup)
    variables = state_variables(model)
    # With a loss scale, a skip is nothing unusual, except at the step that was pointed at.
    skips = clipped_optimizer(model).skip_nonfinite
    for step, (x, y) in zip(range(backup["step"], failed_step + 1), batches, strict=False):
        before = [keras.ops.convert_to_numpy(v) for v in variables]
        loss = model.train_on_batch(x, y, return_dict=True)["loss"]
        if np.isfinite(loss) and all_finite(model) and not (skips and _skipped(model)):
            continue
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)
        return _inspect(model, x, y, step)
    if _skipped(model):
        return _inspect(model, x, y, failed_step)
    return Finding(
        failed_step,
        None,
        None,
        f"step {failed_step}, which was finite when repeated: the device does not compute the "
        "same twice, so the layer is not known",
    )


def _skipped(model) -> bool:
    """Whether the optimizer left out the update of the last step."""
    return clipped_optimizer(model).read_telemetry()["skipped"] > 0


def _inspect(model, x, y, step: int) -> Finding:
    bad_input = not _finite(x)
    output_of = None if bad_input else _first_bad_output(model, x)
    with tf.GradientTape() as tape:
        loss = model.compute_loss(x, y, model(x, training=True), training=True)
    gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
    bad = [
        layer_of(variable)
        for variable, gradient in zip(model.trainable_variables, gradients, strict=True)
        if gradient is not None and not _finite(gradient)
    ]
    layer = bad[-1] if bad else None
    parts = [f"step {step}"]
    if bad_input:
        parts.append("the batch itself holds NaN or infinity")
    if layer:
        parts.append(f"first non-finite gradient in layer {layer!r}")
    if output_of:
        parts.append(f"first non-finite output, forward, from layer {output_of!r}")
    if not layer:
        parts.append("the gradients are finite, the update is not: lower the learning rate")
    return Finding(step, layer, output_of, ", ".join(parts))


def _finite(values) -> bool:
    if isinstance(values, tf.IndexedSlices):
        values = values.values
    return all(
        bool(tf.reduce_all(tf.math.is_finite(value)))
        for value in tf.nest.flatten(values)
        if value.dtype.is_floating
    )


def _first_bad_output(model, x) -> str | None:
    layers = [
        layer
        for layer in model.layers
        if not isinstance(layer, keras.layers.InputLayer) and _has_output(layer)
    ]
    if not layers or not getattr(model, "inputs", None):
        return None  # a subclassed model has no graph to look into
    probe = keras.Model(model.inputs, [layer.output for layer in layers])
    for layer, output in zip(layers, probe(x, training=True), strict=True):
        if not _finite(output):
            return layer.name
    return None


def _has_output(layer) -> bool:
    try:
        return layer.output is not None
    except AttributeError:
        return False
