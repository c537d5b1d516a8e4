"""PilotNet, which predicts the steering angle from an image strip."""

import keras
from keras import layers

from .layers import classifier

IMAGE_SHAPE = (66, 200)  # height and width, for which the paper's layers end at 1 x 18


def pilotnet(num_outputs=1, image_shape=IMAGE_SHAPE, model_class=keras.Model):
    """PilotNet, 252,219 parameters at 66 x 200.

    M. Bojarski et al., "End to end learning for self-driving cars", 2016 (arXiv:1604.07316),
    figure 4: five convolutions without padding, three dense layers, ReLU between them (the paper
    names no activation). Its first layer, a fixed normalisation, is left to the input pipeline.

    Args:
        num_outputs: values predicted.
        image_shape: (height, width) of the RGB images in -1..1; 61 x 61 or more.
        model_class: called as `model_class(inputs, outputs, name="pilotnet")`.

    Returns:
        A functional model to `[batch, num_outputs]`, float32, linear, 0 before training. Not
        compiled.

    Raises:
        ValueError: images too small for the convolutions.
    """
    if min(image_shape) < 61:
        raise ValueError(
            f"image_shape={image_shape} is too small for five convolutions without padding: "
            "resize the images to 61 x 61 or more; the paper has 66 x 200"
        )
    x = inputs = keras.Input((*image_shape, 3), name="images")
    for i, (filters, kernel, stride) in enumerate(
        [(24, 5, 2), (36, 5, 2), (48, 5, 2), (64, 3, 1), (64, 3, 1)], start=1
    ):
        x = layers.Conv2D(filters, kernel, stride, activation="relu", name=f"conv{i}")(x)
    x = layers.Flatten(name="flatten")(x)
    for i, units in enumerate([100, 50, 10], start=1):
        x = layers.Dense(units, activation="relu", name=f"dense{i}")(x)
    # Zero kernel: initial predictions near the mean angle.
    outputs = classifier(x, num_outputs, activation="linear", initializer="zeros")
    return model_class(inputs, outputs, name="pilotnet")
