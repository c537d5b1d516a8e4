"""VGG-16 and VGG-19: the convolutions of keras.applications under a head for any image size."""

import keras
from keras import layers

from .layers import AdaptiveAveragePooling2D, classifier

APPLICATIONS = {16: keras.applications.VGG16, 19: keras.applications.VGG19}


def _with_initializer(base, initializer):
    # keras.applications accepts no initialiser, and glorot's halves the signal at each ReLU: 16
    # layers without batch normalisation then start at a loss of ln(classes) and stay there.
    def clone(layer):
        config = layer.get_config()
        if "kernel_initializer" in config:
            config["kernel_initializer"] = initializer
        return type(layer).from_config(config)

    return keras.models.clone_model(base, clone_function=clone)


def vgg(
    depth,
    inputs,
    num_classes,
    dropout=0.5,
    initializer="he_normal",
    pool_grid=7,
    dense_units=4096,
):
    """VGG with `depth` weight layers, configuration D (16) or E (19), no batch normalisation.

    K. Simonyan and A. Zisserman, "Very deep convolutional networks for large-scale image
    recognition", 2015 (arXiv:1409.1556), table 1. 138,357,544 and 143,667,240 parameters at 1000
    classes.

    Args:
        depth: 16 or 19.
        inputs: images, `[batch, size, size, channels]`, 32 pixels or more.
        num_classes: length of the softmax output.
        dropout: rate after each of the two hidden dense layers.
        initializer: of the hidden kernels.
        pool_grid: side of the adaptive average pooling before the dense layers, which makes
            their shapes independent of the image size.
        dense_units: width of the hidden dense layers.

    Returns:
        Class probabilities, `[batch, num_classes]`, float32.
    """
    base = APPLICATIONS[depth](include_top=False, weights=None, input_shape=inputs.shape[1:])
    x = inputs
    for layer in _with_initializer(base, initializer).layers[1:]:
        x = layer(x)
    x = AdaptiveAveragePooling2D(pool_grid, name="avg_pool")(x)
    x = layers.Flatten(name="flatten")(x)
    for name in ("fc1", "fc2"):
        x = layers.Dense(dense_units, "relu", kernel_initializer=initializer, name=name)(x)
        x = layers.Dropout(dropout, name=f"{name}_dropout")(x)
    return classifier(x, num_classes)
