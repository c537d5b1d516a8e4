"""A recipe small enough for tests: a conv net with batch normalisation and dropout.

Run as a script it behaves as the real ones do; tests start it in processes of its own to kill
them. The data set is embedded MNIST, 512 images of it.
"""

import dataclasses
import sys

from recipes.training import Recipe, main
from recipes.training.options import Option


def build(num_outputs, image_size, model_class, options):
    """Conv, batch normalisation, dropout, dense; `options.poison` makes a NaN on purpose."""
    import keras

    inputs = keras.Input((image_size, image_size, 3))
    x = keras.layers.Conv2D(8, 3, strides=2, name="conv1")(inputs)
    x = keras.layers.BatchNormalization(momentum=0.8, name="bn1")(x)
    x = keras.layers.ReLU(name="relu1")(x)
    if options.poison == "forward":
        x = keras.layers.Lambda(_log_of_relu, name="poisoned")(x)
    x = keras.layers.Conv2D(8, 3, strides=2, activation="relu", name="conv2")(x)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Dropout(0.2)(x)
    outputs = keras.layers.Dense(num_outputs, "softmax", dtype="float32", name="predictions")(x)
    return model_class(inputs, outputs)


def _log_of_relu(x):
    from keras import ops

    return ops.log(x)


def load_data(options):
    """512 training, 100 validation and 100 test images of embedded MNIST."""
    from recipes.data import Split, load

    data = load("mnist_embedded", image_size=options.image_size, augment="shift")
    return dataclasses.replace(
        data,
        train=Split(data.train.dataset.take(512), 512),
        validation=Split(data.validation.dataset.take(100), 100),
        test=Split(data.test.dataset.take(100), 100),
    )


RECIPE = Recipe(
    name="tiny",
    build=build,
    load_data=load_data,
    settings={
        "image_size": 16,
        "epochs": 3,
        "batch_size": 64,
        "learning_rate": 3e-3,
        "weight_decay": 1e-3,
        "threshold": 0.01,
        "tensorboard": False,
        "verbose": "line",
    },
    extra_options=(Option("poison", str, "", "make a NaN", choices=("", "forward")),),
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
