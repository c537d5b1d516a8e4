"""One short file per network over one shared training package."""

import os
import time

#: When this process began, but for Python itself: TensorFlow's import alone takes seconds.
STARTED = time.monotonic()
# Before TensorFlow is imported: its start-up notes bury the one line that matters.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
