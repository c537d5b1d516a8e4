"""What a clip adds to the step of a very small model, on a CPU: `python benchmarks/tiny.py`.

The train function alone, without `fit` around it: rounds of steps, one model after the other, and
of each model its shortest round. On a machine that does something else as well, take more rounds.
"""

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import keras_gradclip as kgc

NETS = {"Dense 10": 1, "10 x Dense 10": 10}
INNERS = {"SGD": lambda: keras.optimizers.SGD(1e-3), "Adam": lambda: keras.optimizers.Adam(1e-3)}


def wrapped(clipper=None, **kwargs):
    return lambda inner: (
        keras.Model,
        {"optimizer": kgc.ClippedOptimizer(inner, clipper, **kwargs)},
    )


def clipped(clipper=None):
    return lambda inner: (kgc.ClippedModel, {"optimizer": inner, "clipper": clipper})


#: What is compared: functions of an inner optimizer, the first the measure of the others.
CASES = {
    "Keras": lambda inner: (keras.Model, {"optimizer": inner}),
    "Keras once more": lambda inner: (keras.Model, {"optimizer": inner}),
    "ClippedOptimizer(None)": wrapped(),
    "ClippedOptimizer(AbsoluteClip)": wrapped(kgc.AbsoluteClip(0.1)),
    "  the same, compiled=False": wrapped(kgc.AbsoluteClip(0.1), compiled=False),
    "ClippedOptimizer(NormClip)": wrapped(kgc.NormClip()),
    "ClippedOptimizer(UpdateRatioClip)": wrapped(kgc.UpdateRatioClip(biases="unit")),
    "ClippedModel(AbsoluteClip)": clipped(kgc.AbsoluteClip(0.1)),
    'ClippedModel("auto")': clipped("auto"),
}


def steps_of(case, layers, inner):
    """A function of a number of steps, which it trains."""
    model_class, arguments = case(inner())
    keras.utils.set_random_seed(0)
    inputs = hidden = keras.Input((10,))
    for _ in range(layers):
        hidden = keras.layers.Dense(10)(hidden)
    model = model_class(inputs, hidden)
    model.compile(loss="mse", **arguments)
    x = np.random.default_rng(0).normal(size=(32, 10)).astype("float32")
    model.train_on_batch(x, x)  # builds the optimizer
    model.make_train_function()
    batches = iter(tf.data.Dataset.from_tensors((x, x)).repeat())

    def run(count):
        for _ in range(count):
            model.train_function(batches)

    run(20)
    return run


def measured(runs, rounds, count):
    """For each function its shortest time a step, in seconds."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run(count)
            best[name] = min(best[name], (time.perf_counter() - start) / count)
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=40, help="steps in a round")
    arguments = parser.parse_args()
    columns = {}
    for net, layers in NETS.items():
        for name, inner in INNERS.items():
            runs = {case: steps_of(make, layers, inner) for case, make in CASES.items()}
            columns[f"{name}, {net}"] = measured(runs, arguments.rounds, arguments.steps)
    print(f"{'time of a step, Keras = 1':36}", *(f"{title:>20}" for title in columns))
    for case in CASES:
        shares = [best[case] / best["Keras"] for best in columns.values()]
        print(f"{case:36}", *(f"{share:20.2f}" for share in shares))
    times = [1e6 * best["Keras"] for best in columns.values()]
    print(f"{'Keras, microseconds':36}", *(f"{t:20.0f}" for t in times))


if __name__ == "__main__":
    main()
