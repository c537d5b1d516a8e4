"""Inception-v2, the BN-Inception of the batch normalisation paper."""

from keras import layers

from .layers import classifier

# Module: (1x1, 3x3 reduce, 3x3, double 3x3 reduce, double 3x3, pool, pool projection), figure 5
# of the paper. No 1x1 branch and no projection: the grid is halved, the pool passed through.
INCEPTIONS = {
    "3a": (64, 64, 64, 64, 96, "avg", 32),
    "3b": (64, 64, 96, 64, 96, "avg", 64),
    "3c": (0, 128, 160, 64, 96, "max", 0),
    "4a": (224, 64, 96, 96, 128, "avg", 128),
    "4b": (192, 96, 128, 96, 128, "avg", 128),
    "4c": (160, 128, 160, 128, 160, "avg", 96),
    "4d": (96, 128, 192, 160, 192, "avg", 96),
    "4e": (0, 128, 192, 192, 256, "max", 0),
    "5a": (352, 192, 320, 160, 224, "avg", 128),
    "5b": (352, 192, 320, 192, 224, "max", 128),
}


def inception_v2(inputs, num_classes, dropout=0.0, initializer="glorot_uniform"):
    """Inception-v2 (BN-Inception), 11,194,984 trainable parameters at 1000 classes.

    S. Ioffe and C. Szegedy, "Batch normalization: accelerating deep network training by reducing
    internal covariate shift", 2015 (arXiv:1502.03167), figure 5, in the variant with a plain 7x7
    convolution as its stem (the paper's own stem is a depthwise separable 7x7 with multiplier 8).
    Each convolution is followed by batch normalisation with gamma and beta, so has no bias. No
    auxiliary heads.

    Args:
        inputs: images, `[batch, size, size, channels]`.
        num_classes: length of the softmax output.
        dropout: rate before the classifier (none in the paper).
        initializer: of the hidden kernels.

    Returns:
        Class probabilities, `[batch, num_classes]`, float32.
    """

    def conv(x, filters, kernel, name, strides=1):
        options = {"use_bias": False, "kernel_initializer": initializer, "name": name}
        x = layers.Conv2D(filters, kernel, strides, "same", **options)(x)
        x = layers.BatchNormalization(name=f"{name}_bn")(x)
        return layers.Activation("relu", name=f"{name}_relu")(x)

    def pool(x, kind, name, strides=1):
        layer = {"avg": layers.AveragePooling2D, "max": layers.MaxPooling2D}[kind]
        return layer(3, strides, padding="same", name=name)(x)

    def inception(x, name, widths):
        name = f"inception_{name}"
        one, reduce3, three, reduce_double, double, pool_kind, project = widths
        strides = 1 if one else 2
        branches = [conv(x, one, 1, f"{name}_1x1")] if one else []
        y = conv(x, reduce3, 1, f"{name}_3x3_reduce")
        branches.append(conv(y, three, 3, f"{name}_3x3", strides))
        y = conv(x, reduce_double, 1, f"{name}_double3x3_reduce")
        y = conv(y, double, 3, f"{name}_double3x3a")
        branches.append(conv(y, double, 3, f"{name}_double3x3b", strides))
        y = pool(x, pool_kind, f"{name}_pool", strides)
        branches.append(conv(y, project, 1, f"{name}_pool_proj") if project else y)
        return layers.Concatenate(name=f"{name}_output")(branches)

    x = conv(inputs, 64, 7, "conv1_7x7", strides=2)
    x = pool(x, "max", "pool1", strides=2)
    x = conv(x, 64, 1, "conv2_3x3_reduce")
    x = conv(x, 192, 3, "conv2_3x3")
    x = pool(x, "max", "pool2", strides=2)
    for name, widths in INCEPTIONS.items():
        x = inception(x, name, widths)
    x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
    if dropout:
        x = layers.Dropout(dropout, name="dropout")(x)
    return classifier(x, num_classes)
