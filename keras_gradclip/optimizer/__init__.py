"""The `ClippedOptimizer`: everything between `apply` and the inner optimizer."""

from keras_gradclip.optimizer.clipped_optimizer import ClippedOptimizer, find

__all__ = ["ClippedOptimizer", "find"]
