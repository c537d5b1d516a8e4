"""Commands that work on recipes: run all, compare, calibrate, or use several workers."""

import recipes.training  # noqa: F401  (TensorFlow, before anything imports it with its noise)
