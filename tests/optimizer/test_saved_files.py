"""Files that versions 0.1 and 0.2 wrote load, and training goes on from them.

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
SAVED = sorted(path.stem for path in (DATA / "saved_0_2").glob("*.keras"))

reads_the_layers = pytest.mark.skipif(
    "input_axes" not in inspect.signature(keras.initializers.GlorotUniform).parameters,
    reason="a Keras older than the one that wrote the file cannot read its layers",
)


def script(name):
    spec = importlib.util.spec_from_file_location(name, DATA / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_0_1(model, maker):
    assert model.clip_hyperparameters["default/0/threshold"] == np.float32(0.4)
    maker.train(model, 2)
    with np.load(DATA / "expected_0_1.npz") as expected:
        for weight, name in zip(model.get_weights(), expected.files, strict=True):
            np.testing.assert_allclose(weight, expected[name], rtol=1e-5, atol=1e-6)


@reads_the_layers
def test_a_keras_file_of_0_1_goes_on():
    model = keras.models.load_model(DATA / "model_0_1.keras")
    check_0_1(model, script("make_saved_files"))


def test_a_checkpoint_of_0_1_goes_on():
    maker = script("make_saved_files")
    model = maker.compiled()
    model.optimizer.build(model.trainable_variables)
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    checkpoint.read(str(DATA / "checkpoint_0_1")).assert_existing_objects_matched()
    check_0_1(model, maker)


def check_0_2(model, name, maker):
    maker.train(model, 2)
    with np.load(DATA / "saved_0_2" / "expected.npz") as expected:
        for i, weight in enumerate(model.get_weights()):
            np.testing.assert_allclose(weight, expected[f"{name}/{i}"], rtol=1e-5, atol=1e-6)


@reads_the_layers
@pytest.mark.parametrize("name", SAVED)
def test_a_keras_file_of_0_2_goes_on(name):
    model = keras.models.load_model(DATA / "saved_0_2" / f"{name}.keras")
    check_0_2(model, name, script("make_saved_files_0_2"))


@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_of_0_2_goes_on(name):
    maker = script("make_saved_files_0_2")
    model = maker.compiled(name)
    model.optimizer.build(model.trainable_variables)
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    checkpoint.read(str(DATA / "saved_0_2" / name)).assert_existing_objects_matched()
    check_0_2(model, name, maker)
