"""`ClippedOptimizer` and its parts."""

from keras_gradclip.optimizer.clipped_optimizer import ClippedOptimizer, find

__all__ = ["ClippedOptimizer", "find"]
