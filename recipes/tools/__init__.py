"""Commands that work on recipes: run all, compare, calibrate, or use several workers."""
