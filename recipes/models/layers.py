"""Layers shared by the networks that Keras lacks."""

import keras
import numpy as np
from keras import layers, ops


@keras.saving.register_keras_serializable(package="recipes")
class LocalResponseNormalization(layers.Layer):
    """Normalises across neighbouring channels, as AlexNet and GoogLeNet did before batch norm.

    y_i = x_i / (bias + alpha / size * sum_j x_j^2) ^ beta, j over the `size` channels around i
    (Krizhevsky et al. 2012, section 3.3; alpha divided by the window as in Caffe's layer, whose
    defaults these are).

    Input and output: `[batch, height, width, channels]`, any float dtype; computed in float32.
    """

    def __init__(self, size=5, alpha=1e-4, beta=0.75, bias=1.0, **kwargs):
        super().__init__(**kwargs)
        if size < 1 or size % 2 == 0:
            raise ValueError(f"size must be an odd number of channels, got size={size}")
        self.size, self.alpha, self.beta, self.bias = size, alpha, beta, bias

    def call(self, inputs):
        """Same shape and dtype as `inputs`."""
        # float16 squares overflow at 256.
        x = ops.cast(inputs, "float32")
        half, channels = self.size // 2, x.shape[-1]
        squares = ops.pad(ops.square(x), [[0, 0], [0, 0], [0, 0], [half, half]])
        window = sum(squares[..., i : i + channels] for i in range(self.size))
        scale = ops.power(self.bias + self.alpha / self.size * window, -self.beta)
        return ops.cast(x * scale, inputs.dtype)

    def get_config(self):
        """The constructor's arguments."""
        config = super().get_config()
        config.update(size=self.size, alpha=self.alpha, beta=self.beta, bias=self.bias)
        return config


@keras.saving.register_keras_serializable(package="recipes")
class AdaptiveAveragePooling2D(layers.Layer):
    """Averages a map of any size into a fixed grid, as torchvision's AlexNet and VGG do.

    Cell i of m averages the pixels floor(i n / m) to ceil((i + 1) n / m) - 1 of n, so a map
    smaller than the grid is repeated. Written as a product with two matrices of means, because
    the layer of the same name in Keras 3.15 fails in a graph where the map is no larger than the
    grid.

    Input: `[batch, height, width, channels]`, height and width known; output: `[batch, grid, grid,
    channels]` of the same dtype.

    Args:
        grid: side of the output.
    """

    def __init__(self, grid, **kwargs):
        super().__init__(**kwargs)
        if grid < 1:
            raise ValueError(f"grid must be 1 or more cells a side, got grid={grid}")
        self.grid = grid

    def _means(self, size, dtype):
        matrix = np.zeros((self.grid, size))
        for i in range(self.grid):
            first, last = i * size // self.grid, -(-(i + 1) * size // self.grid)
            matrix[i, first:last] = 1 / (last - first)
        return ops.convert_to_tensor(matrix, dtype=dtype)

    def call(self, inputs):
        """The means over the cells."""
        _, height, width, _ = inputs.shape
        if height == width == self.grid:
            return inputs
        rows, columns = self._means(height, inputs.dtype), self._means(width, inputs.dtype)
        return ops.einsum("ih,bhwc,jw->bijc", rows, inputs, columns)

    def get_config(self):
        """The constructor's arguments."""
        return {**super().get_config(), "grid": self.grid}


def classifier(
    x, num_classes, name="predictions", activation="softmax", initializer="glorot_uniform"
):
    """The last dense layer, in float32 whatever the dtype policy (float16 loses small classes)."""
    return layers.Dense(
        num_classes,
        activation=activation,
        dtype="float32",
        kernel_initializer=initializer,
        name=name,
    )(x)
