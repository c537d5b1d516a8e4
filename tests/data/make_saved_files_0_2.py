"""Makes the files of version 0.2 in `saved_0_2/`; run at commit 02a6652, from the root.

One small model for each clipper, and for each kind of state that an optimizer has beside it. Each
is trained, saved in the middle (a `.keras` file and a checkpoint), and trained on: `expected.npz`
holds the weights at the end.
"""

from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import keras_gradclip as kgc

HERE = Path(__file__).resolve().parent / "saved_0_2"
CHAIN = kgc.Chain([kgc.AbsoluteClip(0.5), kgc.NormClip(0.3)])
SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.3, 10, 0.9)


def adam():
    return keras.optimizers.Adam(1e-2)


def momentum():
    return keras.optimizers.SGD(0.05, momentum=0.9)


#: name: (inner optimizer, arguments of ClippedOptimizer)
CASES = {
    "absolute": (adam, {"clipper": kgc.AbsoluteClip(0.1, rescale="norm")}),
    "absolute_schedule": (momentum, {"clipper": kgc.AbsoluteClip(SCHEDULE)}),
    "exponential": (adam, {"clipper": kgc.ExponentialClip(0.7, 0.1, rescale="alpha")}),
    "norm": (momentum, {"clipper": kgc.NormClip(0.3)}),
    "rms": (adam, {"clipper": kgc.RMSClip(0.05)}),
    "adaptive": (momentum, {"clipper": kgc.AdaptiveClip(0.05)}),
    "update_ratio": (momentum, {"clipper": kgc.UpdateRatioClip(5e-3, biases=None)}),
    "update_ratio_biases": (
        adam,
        {"clipper": kgc.UpdateRatioClip(5e-3, biases="unit", anneal="learning_rate")},
    ),
    "percentile": (adam, {"clipper": kgc.PercentileClip(90, window=6, scope="layer")}),
    "zscore": (momentum, {"clipper": kgc.ZScoreClip(warmup_steps=2)}),
    "ada": (adam, {"clipper": kgc.AdaClip(warmup_steps=3)}),
    "clip_map": (
        adam,
        {
            "clipper": kgc.ClipMap(
                [("hidden/.*", kgc.ZScoreClip(warmup_steps=2)), (".*/bias", None)], default=CHAIN
            ),
            "gradient_accumulation_steps": 2,
        },
    ),
    "spikes": (momentum, {"clipper": CHAIN, "skip_spikes": 6.0, "skip_nonfinite": True}),
}


def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(48, 6)).astype("float32"), rng.integers(0, 3, 48).astype("int32")


def compiled(name):
    """The model of a case, not yet trained."""
    keras.utils.set_random_seed(7)
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(5, activation="tanh", name="hidden")(inputs)
    model = kgc.ClippedModel(inputs, keras.layers.Dense(3, name="head")(hidden))
    inner, arguments = CASES[name]
    model.compile(
        kgc.ClippedOptimizer(inner(), **arguments),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        loss_weights=20.0,
    )
    return model


def train(model, epochs):
    x, y = data()
    model.fit(x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0)


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    expected = {}
    for name in CASES:
        model = compiled(name)
        train(model, 2)
        for key, value in dict(model.clip_hyperparameters).items():
            if "schedule" not in name:
                model.clip_hyperparameters[key] = 0.9 * value
        model.save(HERE / f"{name}.keras")
        checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        checkpoint.write(str(HERE / name))
        train(model, 2)
        expected |= {f"{name}/{i}": w for i, w in enumerate(model.get_weights())}
    np.savez(HERE / "expected.npz", **expected)
