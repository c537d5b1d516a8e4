"""The two building pieces which the networks share and Keras lacks."""

import keras
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

    def compute_output_shape(self, input_shape):
        """The shape of the input."""
        return input_shape

    def get_config(self):
        """The constructor's arguments."""
        config = super().get_config()
        config.update(size=self.size, alpha=self.alpha, beta=self.beta, bias=self.bias)
        return config


def classifier(x, num_classes, name="predictions", activation="softmax"):
    """The last dense layer, in float32 whatever the dtype policy (float16 loses small classes)."""
    return layers.Dense(num_classes, activation=activation, dtype="float32", name=name)(x)
