"""Makes the files of version 0.1 beside this one; run at commit 446d290, from the root.

A ClippedModel with a stateful clipper, live thresholds, accumulation and momentum is trained, saved
in the middle, and trained on: `expected.npz` holds the weights at the end.
"""

from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import keras_gradclip as kgc

HERE = Path(__file__).resolve().parent


def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(48, 6)).astype("float32"), rng.integers(0, 3, 48).astype("int32")


def compiled():
    """The model of both files, not yet trained."""
    keras.utils.set_random_seed(7)
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(5, activation="tanh", name="hidden")(inputs)
    model = kgc.ClippedModel(inputs, keras.layers.Dense(3, name="head")(hidden))
    model.compile(
        kgc.ClippedOptimizer(
            keras.optimizers.Adam(1e-2),
            kgc.ClipMap(
                [("hidden/.*", kgc.ZScoreClip(warmup_steps=2)), (".*/bias", None)],
                default=kgc.Chain([kgc.AbsoluteClip(0.5), kgc.NormClip(0.3)]),
            ),
            gradient_accumulation_steps=2,
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        loss_weights=20.0,
    )
    return model


def train(model, epochs):
    x, y = data()
    model.fit(x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0)


if __name__ == "__main__":
    model = compiled()
    train(model, 2)
    model.clip_hyperparameters["default/0/threshold"] = 0.4
    model.save(HERE / "model_0_1.keras")
    tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(str(HERE / "checkpoint_0_1"))
    train(model, 2)
    np.savez(HERE / "expected_0_1.npz", *model.get_weights())
