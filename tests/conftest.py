"""Four logical CPU devices stand in for four GPUs; seeds are set before every test."""

import gc
import os
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")

import keras
import pytest

# What a test starts imports this checkout, whatever the environment was set up from.
_paths = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _paths))

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4
    )


_collected = [time.monotonic()]


@pytest.fixture(autouse=True)
def fresh_keras():
    """Every test starts from the same seed, in float32."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("float32")
    yield
    keras.config.set_dtype_policy("float32")
    # At its end an unfinished tf.data iterator waits for a thread that naps, for as long as the
    # iterator is old: found late, one cost 20 seconds.
    if time.monotonic() - _collected[-1] > 10:
        gc.collect()
        _collected[:] = [time.monotonic()]


@pytest.fixture
def blank_pictures(request, monkeypatch):
    """Empty pictures, for tests that look at none: one takes as long to draw as an epoch of theirs.

    The marker `pictures` draws them.
    """
    if request.node.get_closest_marker("pictures"):
        return
    from matplotlib.figure import Figure

    draw = Figure.savefig

    def empty(figure, file, **options):
        if hasattr(file, "write"):  # a part of a page
            draw(figure, file, **options)
        else:
            Path(file).write_bytes(b"\x89PNG\r\n\x1a\n")

    monkeypatch.setattr(Figure, "savefig", empty)


@pytest.fixture(autouse=True, scope="session")
def frozen_imports():
    """What the imports made is not looked through again at each collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def free_memory():
    """Drop the graphs of a test file."""
    yield
    keras.backend.clear_session()
