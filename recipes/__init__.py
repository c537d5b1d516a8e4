"""One short file per network over one shared training package."""

import os
import time

#: Start time of this process, before TensorFlow's import, which takes seconds.
STARTED = time.monotonic()
# Set before TensorFlow is imported, to suppress its start-up notes.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
