"""Files that version 0.1 wrote load, and training goes on from them.

Bit for bit on the machine that wrote them; another processor adds up in another order.
"""

import importlib.util
import inspect
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_gradclip  # noqa: F401 (registers the classes)

tf = pytest.importorskip("tensorflow")

DATA = Path(__file__).resolve().parents[1] / "data"


@pytest.fixture
def maker():
    spec = importlib.util.spec_from_file_location("make_saved_files", DATA / "make_saved_files.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(model, maker):
    assert model.clip_hyperparameters["default/0/threshold"] == np.float32(0.4)
    maker.train(model, 2)
    with np.load(DATA / "expected_0_1.npz") as expected:
        for weight, name in zip(model.get_weights(), expected.files, strict=True):
            np.testing.assert_allclose(weight, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(
    "input_axes" not in inspect.signature(keras.initializers.GlorotUniform).parameters,
    reason="a Keras older than the one that wrote the file cannot read its layers",
)
def test_a_keras_file_of_0_1_goes_on(maker):
    check(keras.models.load_model(DATA / "model_0_1.keras"), maker)


def test_a_checkpoint_of_0_1_goes_on(maker):
    model = maker.compiled()
    model.optimizer.build(model.trainable_variables)
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    checkpoint.read(str(DATA / "checkpoint_0_1")).assert_existing_objects_matched()
    check(model, maker)
