"""Recipes: one short file per network over one shared training module."""

import os

# Before TensorFlow is imported: its start-up notes bury the one line that matters.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
