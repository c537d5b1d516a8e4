"""Imports TensorFlow without the notes that its C++ libraries print before logging is set up.

TF_CPP_MIN_LOG_LEVEL does not reach them, and they would bury a one-line error.
"""

import os
import sys
import tempfile


def import_tensorflow() -> None:
    """Imports TensorFlow and Keras; if that fails, shows what was held back."""
    if "tensorflow" in sys.modules:
        return
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        failed = True
        try:
            import keras  # noqa: F401
            import tensorflow  # noqa: F401

            failed = False
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            if failed:
                held.seek(0)
                os.write(2, held.read())
