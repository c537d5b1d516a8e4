"""The classic CNNs by name: `build("resnet50", num_classes=10, image_size=32)`.

Every network is a functional model from images `[batch, size, size, channels]` to class
probabilities `[batch, num_classes]` in float32. The names of its layers are stable: the rules of a
`keras_gradclip.ClipMap` match them. The last layer is `predictions` everywhere.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import keras

from . import alexnet, googlenet, inception_v2, resnet, vgg
from .googlenet import auxiliary_model_class
from .layers import AdaptiveAveragePooling2D, LocalResponseNormalization

NETWORKS: dict[str, Callable[..., Any]] = {
    "alexnet": alexnet.alexnet,
    "vgg16": partial(vgg.vgg, 16),
    "vgg19": partial(vgg.vgg, 19),
    "googlenet": googlenet.googlenet,
    "inception_v2": inception_v2.inception_v2,
    "resnet50": resnet.resnet50,
}

__all__ = ["NETWORKS", "auxiliary_model_class", "build", "inference_model"]


def build(
    name,
    num_classes=1000,
    image_size=224,
    channels=3,
    model_class=keras.Model,
    batch_norm_momentum=None,
    **network_options,
):
    """Builds a network with fresh weights.

    Args:
        name: alexnet, vgg16, vgg19, googlenet, inception_v2 or resnet50.
        num_classes: length of the softmax output.
        image_size: side of the square input images, or (height, width), in pixels; 32 or more.
        channels: channels of the input images.
        model_class: called as `model_class(inputs, outputs, name=name)`, for example
            `keras_gradclip.ClippedModel`. With GoogLeNet's auxiliary heads it is subclassed: see
            `recipes.models.googlenet.auxiliary_model_class`.
        batch_norm_momentum: momentum of the moving averages of every batch normalisation. The
            default, 0.99, lags behind the weights in runs of a few hundred steps; 0.9 does not.
        **network_options: keyword arguments of the network's function in this package.

    Returns:
        A functional model, not compiled.

    Raises:
        ValueError: unknown name, or images too small.
        TypeError: unknown option.
    """
    if name not in NETWORKS:
        raise ValueError(f"name={name!r} is not a network: use one of {', '.join(NETWORKS)}")
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 32:
        raise ValueError(f"image_size={image_size} is too small: resize the images to 32 or more")
    if batch_norm_momentum is not None and not 0 <= batch_norm_momentum < 1:
        raise ValueError(
            f"batch_norm_momentum={batch_norm_momentum} must be in [0, 1): 0.99 is Keras's default"
        )
    inputs = keras.Input((height, width, channels), name="images")
    outputs = NETWORKS[name](inputs, num_classes, **network_options)
    if isinstance(outputs, list):
        model_class = auxiliary_model_class(model_class)
    model = model_class(inputs, outputs, name=name)
    if batch_norm_momentum is not None:
        for layer in model.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.momentum = batch_norm_momentum
    return model


def inference_model(model: Any) -> keras.Model:
    """The model to deploy: the same layers and weights, without auxiliary heads.

    Loads with `keras.models.load_model` without this package: the layers of
    `recipes.models.layers`, which have no weights, are replaced by Keras operations.

    Args:
        model: built by `build`, or any functional model.

    Returns:
        A plain `keras.Model` whose only output is the main one. Saves without the heads' weights.
    """
    main = keras.Model(model.inputs, model.outputs[0], name=model.name)
    own = (AdaptiveAveragePooling2D, LocalResponseNormalization)
    if not any(isinstance(layer, own) for layer in main.layers):
        return main

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        return layer.call(*args) if isinstance(layer, own) else layer(*args, **kwargs)

    return keras.models.clone_model(main, clone_function=lambda layer: layer, call_function=call)
