"""ResNet-50 of keras.applications under a float32 classifier."""

import keras
from keras import layers

from .layers import classifier


def resnet50(
    inputs,
    num_classes,
    dropout=0.0,
    head_activation="softmax",
    head_initializer="glorot_uniform",
):
    """ResNet-50, 25,636,712 parameters (25,583,592 trainable) at 1000 classes.

    K. He et al., "Deep residual learning for image recognition", 2016 (arXiv:1512.03385), table 1.

    Args:
        inputs: images, `[batch, size, size, channels]`, 32 pixels or more.
        num_classes: length of the softmax output.
        dropout: rate before the classifier (none in the paper).
        head_activation: "linear" for regression.
        head_initializer: of the classifier's kernel; "zeros" starts a regression at 0.

    Returns:
        Class probabilities (or what `head_activation` makes), `[batch, num_classes]`, float32.
    """
    base = keras.applications.ResNet50(include_top=False, weights=None, input_tensor=inputs)
    x = layers.GlobalAveragePooling2D(name="avg_pool")(base.output)
    if dropout:
        x = layers.Dropout(dropout, name="dropout")(x)
    return classifier(x, num_classes, activation=head_activation, initializer=head_initializer)
