"""Label smoothing for integer labels; Keras has it only for one-hot targets."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="recipes")
class SmoothedCrossentropy(keras.losses.Loss):
    """Cross-entropy of integer labels with label smoothing.

    The target is (1 − ε)·one-hot + ε/classes: Szegedy et al., "Rethinking the Inception
    architecture for computer vision", 2016, section 7. Equal to
    `keras.losses.CategoricalCrossentropy(label_smoothing=ε)` on one-hot labels.

    Args:
        label_smoothing: ε, in 0..1.

    Call with integer labels [n] (or [n, 1]) and probabilities [n, classes].
    """

    def __init__(self, label_smoothing: float, name: str = "smoothed_crossentropy", **kwargs):
        super().__init__(name=name, **kwargs)
        self.label_smoothing = label_smoothing

    def call(self, y_true, y_pred):
        """Losses [n]."""
        classes = y_pred.shape[-1]
        labels = ops.reshape(ops.cast(y_true, "int32"), [-1])
        target = ops.one_hot(labels, classes, dtype=y_pred.dtype)
        return keras.losses.categorical_crossentropy(
            target, y_pred, label_smoothing=self.label_smoothing
        )

    def get_config(self):
        """The constructor's arguments."""
        return {**super().get_config(), "label_smoothing": self.label_smoothing}
