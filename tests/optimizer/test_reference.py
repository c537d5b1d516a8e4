"""Traced updates, their modes sampled pairwise, against one update in float64 NumPy.

The fuzz draws more, and seldom a traced step on replicas.
"""

import contextlib
import itertools

import keras
import numpy as np
import pytest
from helpers import strategy
from oracles import Clip, ReferenceUpdate, adam, sgd

import keras_gradclip as kgc

tf = pytest.importorskip("tensorflow")

MODES = {
    "replicas": (0, 2),
    "micro_steps": (1, 3),
    "scaling": ("none", "fixed", "dynamic"),
    "nonfinite": ("none", "first", "last"),
    "skip": (False, True),
    "clip": ("none", "exponential", "layer norm"),
    "inner": ("sgd", "adam"),
    "gradients": ("dense", "sparse", "missing in the last", "subset"),
}
CLIPPERS = {
    "none": None,
    "exponential": kgc.ExponentialClip(0.7, 0.2),
    "layer norm": kgc.NormClip(0.5),
}
SHAPES = {"a/kernel": (4, 3), "a/bias": (3,), "b/kernel": (3, 2), "b/bias": (2,)}
CALLS = 9


def is_possible(mode):
    """Without a check, an infinity reaches the weights: nothing to compare."""
    checked = mode.get("skip") or mode.get("scaling") == "dynamic"
    return mode.get("nonfinite", "none") == "none" or checked or "skip" not in mode


def pairwise(modes, seed=0):
    """Few combinations in which every pair of values of two modes occurs, greedily."""
    rng = np.random.default_rng(seed)
    names = list(modes)
    open_pairs = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x in modes[a]
        for y in modes[b]
    }
    rows = []
    for _ in range(400):
        candidates = [{n: modes[n][rng.integers(len(modes[n]))] for n in names} for _ in range(60)]
        candidates = [c for c in candidates if is_possible(c)]
        news = [
            {p for p in open_pairs if c[p[0][0]] == p[0][1] and c[p[1][0]] == p[1][1]}
            for c in candidates
        ]
        best = int(np.argmax([len(n) for n in news]))
        if news[best]:
            open_pairs -= news[best]
            rows.append(candidates[best])
    impossible = {
        p for p in open_pairs if not is_possible({**dict(p), "skip": dict(p).get("skip")})
    }
    assert not open_pairs - impossible, sorted(map(str, open_pairs - impossible))
    return rows


ROWS = pairwise(MODES)


def gradients(mode, call, replicas, rng):
    """For each replica the gradients of one call, NumPy float32: array, (rows, values), None."""
    result = []
    for replica in range(replicas):
        grads = [rng.normal(size=s).astype("float32") for s in SHAPES.values()]
        if mode["gradients"] == "sparse":
            grads[0] = (np.array([1, 3, 1]), rng.normal(size=(3, 3)).astype("float32"))
        if mode["gradients"] == "missing in the last" and call % mode["micro_steps"] == 2:
            grads[2] = None
        if mode["gradients"] == "subset":
            grads[3] = None
        bad = {"none": -1, "first": 0, "last": replicas - 1}[mode["nonfinite"]]
        if call == 4 and replica == bad:
            grads[1][0] = np.inf
        result.append(grads)
    return result


def to_tensor(g, scale):
    if g is None:
        return None
    if isinstance(g, tuple):
        rows, values = g
        shape = tf.constant(SHAPES["a/kernel"], "int64")
        return tf.IndexedSlices(
            tf.convert_to_tensor(values) * scale, tf.convert_to_tensor(rows), shape
        )
    return tf.convert_to_tensor(g) * scale


def scaled(g, scale):
    if g is None:
        return None
    return (g[0], g[1] * scale) if isinstance(g, tuple) else g * scale


def make_variables(rng):
    variables = []
    for path, shape in SHAPES.items():
        layer, name = path.split("/")
        with keras.name_scope(layer):
            variables.append(keras.Variable(rng.normal(size=shape).astype("float32"), name=name))
    return variables


def make_optimizer(mode):
    inner = {
        "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
        "adam": lambda: keras.optimizers.Adam(0.1),
    }[mode["inner"]]()
    if mode["scaling"] == "fixed":
        inner.loss_scale_factor = 8.0
    optimizer = kgc.ClippedOptimizer(
        inner,
        CLIPPERS[mode["clip"]],
        gradient_accumulation_steps=mode["micro_steps"] if mode["micro_steps"] > 1 else None,
        skip_nonfinite=mode["skip"],
        telemetry=2,
    )
    if mode["scaling"] == "dynamic":
        return optimizer, keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=64.0)
    return optimizer, optimizer


@pytest.mark.parametrize("mode", ROWS, ids=lambda m: "-".join(str(v) for v in m.values()))
def test_update(mode):
    rng = np.random.default_rng(1)
    scope = strategy(mode["replicas"])
    replicas = max(mode["replicas"], 1)
    with scope.scope() if scope else contextlib.nullcontext():
        variables = make_variables(rng)
        optimizer, outer = make_optimizer(mode)
        outer.build(variables)
    reference = ReferenceUpdate(
        [np.array(first_copy(v), "float64") for v in variables],
        list(SHAPES),
        clip=Clip(CLIPPERS[mode["clip"]]),
        inner={"sgd": sgd, "adam": adam}[mode["inner"]],
        micro_steps=mode["micro_steps"],
        skip=mode["skip"],
        scale={"none": None, "fixed": 8.0, "dynamic": 64.0}[mode["scaling"]],
        dynamic=mode["scaling"] == "dynamic",
    )
    named = variables[:3] if mode["gradients"] == "subset" else variables

    def step(grads):
        def replica():
            context = tf.distribute.get_replica_context()
            index = context.replica_id_in_sync_group if scope else 0
            if not isinstance(index, int):
                index = int(tf.get_static_value(index))
            scale = 8.0 if mode["scaling"] == "fixed" else 1.0
            if mode["scaling"] == "dynamic":
                scale = outer.dynamic_scale.value
            mine = [to_tensor(g, scale) for g in grads[index]]
            outer.apply(mine[: len(named)], named)

        scope.run(replica) if scope else replica()

    step = tf.function(step, autograph=False)
    for call in range(CALLS):
        grads = gradients(mode, call, replicas, rng)
        step(grads)
        reference.call([[scaled(g, reference.scale or 1.0) for g in own] for own in grads])
    for variable, want in zip(variables, reference.weights, strict=True):
        for copy in all_copies(variable):
            np.testing.assert_allclose(copy, want, rtol=1e-4, atol=1e-5, err_msg=variable.path)
    assert optimizer.skipped_steps == reference.skipped
    assert int(first_copy(optimizer.iterations).numpy()) == reference.updates
    telemetry = optimizer.read_telemetry()
    assert (telemetry["updates"], telemetry["skipped"]) == (reference.updates, reference.skipped)
    if mode["scaling"] == "dynamic":
        assert float(first_copy(outer.dynamic_scale).numpy()) == reference.scale


def all_copies(variable):
    value = getattr(variable, "value", variable)
    return [np.array(v) for v in getattr(value, "values", [value])]


def first_copy(variable):
    value = getattr(variable, "value", variable)
    return getattr(value, "values", [value])[0]
