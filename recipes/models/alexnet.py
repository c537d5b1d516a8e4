"""AlexNet, one tower."""

from keras import layers

from .layers import AdaptiveAveragePooling2D, classifier

# Layer: (filters, kernel, padding in pixels, 3x3/2 max pool after it?)
CONVOLUTIONS = {
    "conv1": (64, 11, 2, True),
    "conv2": (192, 5, 2, True),
    "conv3": (384, 3, 1, False),
    "conv4": (256, 3, 1, False),
    "conv5": (256, 3, 1, True),
}


def _smallest_map(image_size, stem_stride):
    size = image_size
    for name, (_, kernel, padding, pool) in CONVOLUTIONS.items():
        stride = stem_stride if name == "conv1" else 1
        size = (size + 2 * padding - kernel) // stride + 1
        size = (size - 3) // 2 + 1 if pool else size
    return size


def alexnet(
    inputs,
    num_classes,
    dropout=0.5,
    initializer="he_normal",
    stem_stride=None,
    pool_grid=6,
    dense_units=4096,
):
    """AlexNet in one tower, without local response normalisation.

    A. Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014
    (arXiv:1404.5997); filters as in torchvision. 61,100,840 parameters at 1000 classes.

    Args:
        inputs: images, `[batch, size, size, channels]`.
        num_classes: length of the softmax output.
        dropout: rate before each of the two hidden dense layers.
        initializer: of the hidden kernels. The paper's N(0, 0.01) needs long training.
        stem_stride: conv1's stride. `None`: the paper's 4 if the last feature map is not empty
            (63 pixels or more), else the larger of 2 and 1 for which it is not.
        pool_grid: side of the adaptive average pooling before the dense layers.
        dense_units: width of the hidden dense layers.

    Returns:
        Class probabilities, `[batch, num_classes]`, float32.
    """
    size = min(inputs.shape[1:3])
    if stem_stride is None:
        stem_stride = next((s for s in (4, 2, 1) if _smallest_map(size, s) > 0), 1)
    if _smallest_map(size, stem_stride) < 1:
        raise ValueError(
            f"alexnet has no pixel left at image_size={size} and stem_stride={stem_stride}: "
            "use larger images or a smaller stem_stride"
        )
    x = inputs
    for name, (filters, kernel, padding, pool) in CONVOLUTIONS.items():
        x = layers.ZeroPadding2D(padding, name=f"{name}_pad")(x)
        x = layers.Conv2D(
            filters,
            kernel,
            strides=stem_stride if name == "conv1" else 1,
            activation="relu",
            kernel_initializer=initializer,
            name=name,
        )(x)
        if pool:
            x = layers.MaxPooling2D(3, 2, name=name.replace("conv", "pool"))(x)
    x = AdaptiveAveragePooling2D(pool_grid, name="avg_pool")(x)
    x = layers.Flatten(name="flatten")(x)
    for name in ("fc6", "fc7"):
        x = layers.Dropout(dropout, name=f"{name}_dropout")(x)
        x = layers.Dense(dense_units, "relu", kernel_initializer=initializer, name=name)(x)
    return classifier(x, num_classes)
