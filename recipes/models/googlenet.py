"""GoogLeNet as published in 2014, with its two auxiliary heads."""

from functools import cache
from typing import Any

import keras
from keras import layers

from .layers import AdaptiveAveragePooling2D, LocalResponseNormalization, classifier

AUXILIARY_WEIGHT = 0.3

# Module: (1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection), the paper's table 1.
INCEPTIONS = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}
POOL_BEFORE = {"4a": "pool3", "5a": "pool4"}
AUXILIARY_AFTER = {"4a": "aux1", "4d": "aux2"}


def googlenet(
    inputs, num_classes, dropout=0.4, aux_dropout=0.7, aux_heads=True, initializer="glorot_uniform"
):
    """GoogLeNet, 6,998,552 parameters at 1000 classes, 13,378,280 with the auxiliary heads.

    C. Szegedy et al., "Going deeper with convolutions", 2015 (arXiv:1409.4842), table 1 and
    section 5; local response normalisation as in the authors' Caffe model.

    Args:
        inputs: images, `[batch, size, size, channels]`.
        num_classes: length of the softmax outputs.
        dropout: rate before the classifier.
        aux_dropout: rate before the classifiers of the auxiliary heads.
        aux_heads: whether to build the two auxiliary heads, on modules 4a and 4d.
        initializer: of the hidden kernels.

    Returns:
        Class probabilities, `[batch, num_classes]`, float32; with `aux_heads` a list of three:
        the main head's, then those of the auxiliary heads.
    """

    def conv(x, filters, kernel, name, strides=1):
        options = {"activation": "relu", "kernel_initializer": initializer, "name": name}
        return layers.Conv2D(filters, kernel, strides, "same", **options)(x)

    def max_pool(x, name, strides=2):
        return layers.MaxPooling2D(3, strides, padding="same", name=name)(x)

    def inception(x, name, widths):
        name = f"inception_{name}"
        one, reduce3, three, reduce5, five, project = widths
        branches = [
            conv(x, one, 1, f"{name}_1x1"),
            conv(conv(x, reduce3, 1, f"{name}_3x3_reduce"), three, 3, f"{name}_3x3"),
            conv(conv(x, reduce5, 1, f"{name}_5x5_reduce"), five, 5, f"{name}_5x5"),
            conv(max_pool(x, f"{name}_pool", strides=1), project, 1, f"{name}_pool_proj"),
        ]
        return layers.Concatenate(name=f"{name}_output")(branches)

    x = conv(inputs, 64, 7, "conv1_7x7", strides=2)
    x = max_pool(x, "pool1")
    x = LocalResponseNormalization(name="norm1")(x)
    x = conv(x, 64, 1, "conv2_3x3_reduce")
    x = conv(x, 192, 3, "conv2_3x3")
    x = LocalResponseNormalization(name="norm2")(x)
    x = max_pool(x, "pool2")
    heads = []
    for name, widths in INCEPTIONS.items():
        if name in POOL_BEFORE:
            x = max_pool(x, POOL_BEFORE[name])
        x = inception(x, name, widths)
        if aux_heads and name in AUXILIARY_AFTER:
            head = AUXILIARY_AFTER[name]
            heads.append(_auxiliary(x, head, conv, num_classes, aux_dropout, initializer))
    x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
    x = layers.Dropout(dropout, name="dropout")(x)
    main = classifier(x, num_classes)
    return [main, *heads] if heads else main


def _auxiliary(x, name, conv, num_classes, dropout, initializer):
    # 5x5/3 takes the 14x14 maps of 224-pixel images to 4x4; other sizes get that grid too.
    if x.shape[1:3] == (14, 14):
        x = layers.AveragePooling2D(5, 3, name=f"{name}_pool")(x)
    else:
        x = AdaptiveAveragePooling2D(4, name=f"{name}_pool")(x)
    x = conv(x, 128, 1, f"{name}_conv")
    x = layers.Flatten(name=f"{name}_flatten")(x)
    x = layers.Dense(1024, "relu", kernel_initializer=initializer, name=f"{name}_fc")(x)
    x = layers.Dropout(dropout, name=f"{name}_dropout")(x)
    return classifier(x, num_classes, name=f"{name}_predictions")


@cache
def auxiliary_model_class(model_class: Any) -> Any:
    """A subclass of `model_class` (`keras.Model` or one with its methods) for auxiliary heads.

    Its instances are built from `[main, *auxiliary]` outputs, yet to `fit`, `evaluate` and
    `predict` they look like a model of the main output alone: one target, one loss, one set of
    metrics. In training, `compute_loss` adds the compiled loss of each auxiliary head at a weight
    of 0.3 (Szegedy et al. 2015, section 5). At inference the heads are not computed.

    Call it before a new process loads a model with heads from a `.keras` file, because the call
    registers the class; `inference_model` returns a plain model that does not need this.
    """

    class AuxiliaryHeads(model_class):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            # Keras matches losses, metrics and targets with these: only the main head.
            self.output_names: list[str] = self.output_names[:1]

        def call(self, inputs, training=None, mask=None):
            outputs = super().call(inputs, training=training, mask=mask)
            return outputs if training else outputs[0]

        def compute_output_spec(self, inputs, training=None, mask=None):
            outputs = super().compute_output_spec(inputs, training=training, mask=mask)
            return outputs if training else outputs[0]

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            main, *auxiliary = _heads(y_pred)
            total = super().compute_loss(x, y, main, sample_weight, training=training)
            if auxiliary:
                loss = _as_loss(self.loss)
                total += AUXILIARY_WEIGHT * sum(loss(y, head, sample_weight) for head in auxiliary)
            return total

        def compute_metrics(self, x, y, y_pred, sample_weight=None):
            return super().compute_metrics(x, y, _heads(y_pred)[0], sample_weight)

    AuxiliaryHeads.__name__ = AuxiliaryHeads.__qualname__ = f"{model_class.__name__}AuxiliaryHeads"
    return keras.saving.register_keras_serializable(package="recipes")(AuxiliaryHeads)


class _MeanLoss(keras.losses.Loss):
    def __init__(self, function):
        super().__init__(name="auxiliary_loss")
        self.function = function

    def call(self, y_true, y_pred):
        return self.function(y_true, y_pred)


def _as_loss(identifier):
    # A name means a function with one value per example, without compile()'s mean over the global
    # batch.
    loss = keras.losses.get(identifier)
    return loss if isinstance(loss, keras.losses.Loss) else _MeanLoss(loss)


def _heads(y_pred):
    return list(y_pred) if isinstance(y_pred, (list, tuple)) else [y_pred]


# The class of `build("googlenet")`, so that its files load wherever this module is imported.
auxiliary_model_class(keras.Model)
