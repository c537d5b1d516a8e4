"""Scenarios of test_multiworker.py, which run in one process and on several workers.

The script `multiworker_scenarios.py FOLDER NAME ...`, with the checkout on PYTHONPATH, runs the
scenarios under the strategy of TF_CONFIG and writes their results into `FOLDER/NAME-INDEX.npz`.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from helpers import CLASSES, CLIPPERS, data, loss, net, weights

import keras_gradclip as kgc

BATCH = 12  # of all workers together: 2 and 3 divide it
MORE_CLIPPERS = {
    "adaptive": kgc.AdaptiveClip(0.01),
    "rms": kgc.RMSClip(0.01),
    "percentile": kgc.PercentileClip(10),
    "z-score": kgc.ZScoreClip(z_threshold=0.1, warmup_steps=2),
    "adagc": kgc.AdaClip(warmup_steps=2),
}


# Each replica's loss is divided by their number, so that float16 overflows at another scale.
NO_OVERFLOW = {"loss_weights": 1.0}


def adam():
    return keras.optimizers.Adam(1e-2)


def compiled(strategy, optimizer=adam, model=net, **arguments):
    """A net made under the strategy, its loss steep enough for every clipper to clip."""
    with strategy.scope() if strategy else contextlib.nullcontext():
        made = model()
        arguments = {"loss": loss(), "loss_weights": 30.0, "metrics": ["accuracy"], **arguments}
        made.compile(optimizer(), **arguments)
    return made


def fitted(strategy, optimizer=adam, model=net, steps=4, batch=BATCH, more=0, fit=None, **compile):
    """Trains on arrays; the weights, the history, and the logs of each batch."""
    x, y = data(steps * batch + more)
    made = compiled(strategy, optimizer, model, **compile)
    logs = []
    each = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: keep(logs))

    def keep(entry):
        logs.append([float(entry[name]) for name in sorted(entry)])

    fit = {"callbacks": [], **(fit or {})}
    fit["callbacks"] = [*fit["callbacks"], each]
    arguments = {"batch_size": batch, "shuffle": False, "verbose": 0, **fit}
    history = made.fit(x, y, **arguments).history
    return made, {"weights": weights(made), "batch_logs": np.array(logs), **as_arrays(history)}


def as_arrays(history):
    return {f"history_{name}": np.array(values, float) for name, values in history.items()}


def only(result):
    return result[1]


def momentum():
    """For float16: Adam makes a whole step of the rounding error in a gradient near zero."""
    return keras.optimizers.SGD(0.02, momentum=0.9)


def accumulated(inner=adam, **arguments):
    def make():
        return kgc.ClippedOptimizer(inner(), kgc.NormClip(0.5), **arguments)

    return make


def overflow(strategy, policy="float32", **arguments):
    """One example is infinite, in the last worker's part alone: all have to skip the update."""
    keras.config.set_dtype_policy(policy)
    try:
        x, y = data(4 * BATCH)
        x[2 * BATCH - 1] = np.inf
        made = compiled(strategy, accumulated(momentum, **arguments), **NO_OVERFLOW)
        made.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
        optimizer = made.optimizer
        result = {"weights": weights(made)}
        if policy != "float32":
            result["scale"] = optimizer.dynamic_scale.numpy()
            optimizer = optimizer.inner_optimizer
        result["skipped"] = optimizer.skipped_steps
        result["updates"] = optimizer.iterations.numpy()
        return result
    finally:
        keras.config.set_dtype_policy("float32")


def half_precision(strategy):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        return only(fitted(strategy, momentum, clipper=kgc.NormClip(0.1, "global"), **NO_OVERFLOW))
    finally:
        keras.config.set_dtype_policy("float32")


def embedding(strategy):
    def model():
        keras.utils.set_random_seed(1)
        inputs = keras.Input((6,), dtype="int32")
        h = keras.layers.Embedding(20, 4, name="table")(inputs)
        outputs = keras.layers.Dense(CLASSES, name="head")(keras.layers.Flatten()(h))
        return kgc.ClippedModel(inputs, outputs)

    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, (24, 6)), rng.integers(0, CLASSES, 24)
    made = compiled(strategy, lambda: keras.optimizers.SGD(0.1), model, clipper=kgc.NormClip(0.5))
    history = made.fit(x, y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0).history
    return {"weights": weights(made), **as_arrays(history)}


def evaluation(strategy):
    """Evaluation and prediction, also where the last batch is a small one."""
    made = compiled(strategy, steps_per_execution=2, clipper=kgc.NormClip(0.5))
    x, y = data(3 * BATCH + 6)
    return {
        "evaluate": np.array(made.evaluate(x, y, batch_size=BATCH, verbose=0)),
        "predict": made.predict(x, batch_size=BATCH, verbose=0),
        "two_steps": made.predict(x, batch_size=BATCH, steps=2, verbose=0),
    }


def weighted(strategy):
    x, y = data(2 * BATCH)
    made = compiled(strategy, clipper=kgc.NormClip(0.5))
    by_class = made.fit(x, y, class_weight={0: 1.0, 1: 2.0, 2: 0.5}, batch_size=BATCH, verbose=0)
    by_sample = made.fit(
        x, y, sample_weight=np.linspace(0, 2, len(x)), batch_size=BATCH, shuffle=False, verbose=0
    )
    return {
        "weights": weights(made),
        "class": by_class.history["loss"],
        "sample": by_sample.history["loss"],
    }


def dataset(strategy):
    """A tf.data.Dataset, as it comes and with the sharding policy turned to DATA."""
    x, y = data(2 * BATCH)
    made = compiled(strategy, clipper=kgc.NormClip(0.5))
    for policy in ("AUTO", "DATA"):
        options = tf.data.Options()
        options.experimental_distribute.auto_shard_policy = getattr(
            tf.data.experimental.AutoShardPolicy, policy
        )
        batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH).with_options(options)
        made.fit(batches, validation_data=batches, verbose=0)
    return {"weights": weights(made)}


def own_batches(strategy):
    """train_on_batch and test_on_batch, each worker with its part."""
    x, y = data(2 * BATCH)
    made = compiled(strategy, clipper=kgc.NormClip(0.5))
    count = strategy.num_replicas_in_sync if strategy else 1
    here = strategy.cluster_resolver.task_id if strategy else 0
    for start in (0, BATCH):
        part = slice(start + here, start + BATCH, count)
        made.train_on_batch(x[part], y[part])
    part = slice(here, BATCH, count)
    scores = made.test_on_batch(x[part], y[part], return_dict=True)
    return {"weights": weights(made), "loss": scores["loss"], "accuracy": scores["accuracy"]}


def own_loop(strategy):
    """A plain model and a loop around strategy.run."""
    x, y = data(BATCH)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = net(keras.Model)
        optimizer = kgc.ClippedOptimizer(keras.optimizers.SGD(1.0), kgc.AbsoluteClip(0.1))

    def replica(x, y):
        with tf.GradientTape() as tape:
            losses = keras.losses.sparse_categorical_crossentropy(y, model(x), from_logits=True)
            value = 1e3 * tf.reduce_sum(losses) / BATCH
        grads = tape.gradient(value, model.trainable_variables)
        optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))

    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    if strategy:
        step = tf.function(lambda batch: strategy.run(replica, args=batch))
        step(next(iter(strategy.experimental_distribute_dataset(batches))))
    else:
        replica(*next(iter(batches)))
    return {"weights": weights(model)}


def monitored(strategy):
    watch = {"callbacks": [kgc.ClipMonitor(every=2)], "epochs": 2}
    return only(fitted(strategy, clipper=kgc.NormClip(0.5), fit=watch))


def one_reduction(strategy):
    """How often `all_reduce` is called, and on how many tensors, while a step is traced."""
    calls = []
    original = tf.distribute.ReplicaContext.all_reduce

    def counting(self, op, value, options=None):
        calls.append(len(tf.nest.flatten(value)))
        return original(self, op, value, options)

    tf.distribute.ReplicaContext.all_reduce = counting
    try:
        fitted(strategy, accumulated(gradient_accumulation_steps=2), steps=2)
    finally:
        tf.distribute.ReplicaContext.all_reduce = original
    return {"calls": np.array(calls)}


SCENARIOS = {
    "no-clipper": lambda s: only(fitted(s, clipper=None, steps=8)),
    **{
        f"clipper-{name}": lambda s, clipper=clipper: only(fitted(s, clipper=clipper, steps=8))
        for name, clipper in {**CLIPPERS, **MORE_CLIPPERS}.items()
    },
    "accumulation": lambda s: only(fitted(s, accumulated(gradient_accumulation_steps=2), steps=6)),
    "eager": lambda s: only(
        fitted(s, accumulated(gradient_accumulation_steps=2), run_eagerly=True)
    ),
    "moving-average": lambda s: only(
        fitted(
            s,
            lambda: keras.optimizers.SGD(
                0.05, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=3
            ),
            clipper=kgc.NormClip(0.5),
        )
    ),
    "steps-per-execution": lambda s: only(
        fitted(
            s,
            clipper=kgc.NormClip(0.5),
            steps=5,
            steps_per_execution=3,
            fit={"epochs": 2, "validation_data": data(2 * BATCH, seed=3)},
        )
    ),
    # 4·12 + 6: the last batch is smaller, and 2 and 3 divide it as well
    "small-last-batch": lambda s: only(
        fitted(s, clipper=kgc.NormClip(0.5), more=6, fit={"epochs": 2, "validation_split": 0.0})
    ),
    "skip": lambda s: overflow(s, skip_nonfinite=True),
    "skip-accumulated": lambda s: overflow(s, skip_nonfinite=True, gradient_accumulation_steps=2),
    "loss-scale": lambda s: overflow(s, "mixed_float16"),
    "half-precision": half_precision,
    "embedding": embedding,
    "evaluation": evaluation,
    "weighted": weighted,
    "dataset": dataset,
    "own-batches": own_batches,
    "own-loop": own_loop,
    "monitor": monitored,
}


def files(strategy, folder):
    """Two runs with everything that writes: one that stops, and one that goes on from its backup.

    Returns what the second ended with, and what a run without a stop ends with.
    """

    def make():
        return compiled(strategy, accumulated(gradient_accumulation_steps=2))

    def callbacks():
        return [
            keras.callbacks.ModelCheckpoint(folder / "epoch-{epoch}.keras"),
            keras.callbacks.CSVLogger(folder / "log.csv", append=True),
            keras.callbacks.TensorBoard(folder / "tensorboard"),
            keras.callbacks.BackupAndRestore(folder / "backup"),
            kgc.ClipMonitor(folder / "monitor", every=1),
        ]

    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                raise InterruptedError

    x, y = data(2 * BATCH)
    arguments = {"batch_size": BATCH, "epochs": 3, "shuffle": False, "verbose": 0}
    with contextlib.suppress(InterruptedError):
        make().fit(x, y, callbacks=[*callbacks(), Stop()], **arguments)
    resumed = make()
    mine = callbacks()
    resumed.fit(x, y, callbacks=mine, **arguments)
    whole = make()
    whole.fit(x, y, **arguments)
    return {
        "resumed": weights(resumed),
        "whole": weights(whole),
        "place": np.array(mine[0].filepath),
    }


def main(folder, names):
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    here = strategy.cluster_resolver.task_id
    for name in names:
        if name == "files":
            result = files(strategy, Path(folder) / "files")
        else:
            result = {**SCENARIOS, "one-reduction": one_reduction}[name](strategy)
        np.savez(Path(folder) / f"{name}-{here}.npz", **result)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
