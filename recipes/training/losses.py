"""Label smoothing for integer labels; Keras has it only for one-hot targets."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="recipes")
class SmoothedCrossentropy(keras.losses.CategoricalCrossentropy):
    """Cross-entropy of integer labels with label smoothing.

    The target is (1 − ε)·one-hot + ε/classes: Szegedy et al., "Rethinking the Inception
    architecture for computer vision", 2016, section 7. The arguments are those of
    `keras.losses.CategoricalCrossentropy`, of which `label_smoothing` is ε, in 0..1.

    Call with integer labels [n] (or [n, 1]) and probabilities [n, classes].
    """

    def call(self, y_true, y_pred):
        """Losses [n]."""
        labels = ops.reshape(ops.cast(y_true, "int32"), [-1])
        return super().call(ops.one_hot(labels, y_pred.shape[-1], dtype=y_pred.dtype), y_pred)
