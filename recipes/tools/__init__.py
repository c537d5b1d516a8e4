"""Which commands work on recipes? All of them, compared, calibrated, or on several workers."""

import recipes.training  # noqa: F401  (TensorFlow, before anything imports it with its noise)
