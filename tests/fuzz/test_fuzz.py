"""Random configurations against one update in NumPy, and against themselves saved and resumed.

FUZZ_EXAMPLES (of all fuzz tests together) and FUZZ_SEED say how many and which: `make fuzz`.
"""

import contextlib
import dataclasses
import functools
import json
import types
import warnings

import hypothesis
import keras
import numpy as np
import pytest
from configuration import INNER, IS_TENSORFLOW, RATE, configurations, falling
from examples import EXAMPLES, PARTS, fuzzed
from helpers import strategy, to64
from hypothesis import strategies as st
from oracles import LIMITS, MEMORIES, Clip, ReferenceUpdate, adam, limits_updates, sgd

import keras_gradclip as kgc
from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip.clippers import selectable
from keras_gradclip.optimizer import _compiled, _skips

if IS_TENSORFLOW:
    import tensorflow as tf

WINDOW = 4  # of the norms that a spike is measured by
GROWTH_STEPS = 2
SCALES = {"none": None, "fixed": 8.0, "dynamic": 64.0}

cached_strategy = functools.cache(strategy)


class KerasUpdate(ReferenceUpdate):
    """The reference around a stock optimizer on float64 variables."""

    optimizer: object = None

    def _apply(self, present, clipped):
        if self.optimizer is None:
            self.optimizer = self.inner
            self.variables = [keras.Variable(w, dtype="float64") for w in self.weights]
            self.optimizer.build(self.variables)
        variables = [self.variables[i] for i in present]
        decay = (self.optimizer.weight_decay or 0.0) * float(self.optimizer.learning_rate)
        before = [(1.0 - decay) * to64(v) for v in variables]
        gradients = [keras.ops.convert_to_tensor(g, "float64") for g in clipped]
        self.optimizer.apply(gradients, variables)
        self.weights = [to64(v) for v in self.variables]
        self._bound_steps(present, before)
        for variable, weight in zip(self.variables, self.weights, strict=True):
            variable.assign(weight)


def rate_of(c):
    return falling(RATE) if c.rate_falls else RATE


def make_reference(c, weights):
    factors = [1.0]  # of what was set in mid-training

    def rate(step):
        return float(falling(RATE)(step)) if c.rate_falls else RATE * np.prod(factors)

    plain = functools.partial(sgd, momentum=0.0)
    numpy_inner = {"sgd": sgd, "adam": adam, "plain sgd": plain}.get(c.inner)
    if numpy_inner is None or (c.changes and IS_TENSORFLOW):
        cls, inner = KerasUpdate, INNER[c.inner](rate_of(c))
    else:
        cls = ReferenceUpdate

        def inner(weight, g, slot, step):
            return numpy_inner(weight, g, slot, step, learning_rate=rate(step - 1))

    bounds = limits_updates(c.clipper)
    has_two = bounds and not isinstance(INNER[c.inner](RATE), keras.optimizers.SGD)
    reference = cls(
        [np.array(w, "float64") for w in weights],
        list(c.shapes),
        clip=Clip(c.clipper, rate, False if has_two else None),
        bound=Clip(c.clipper, rate, True) if has_two else None,
        inner=inner,
        micro_steps=c.micro_steps,
        skip=c.skip,
        scale=SCALES[c.scaling],
        dynamic=c.scaling == "dynamic",
        growth_steps=GROWTH_STEPS,
        spikes=(c.spikes, WINDOW) if c.spikes else None,
    )
    reference.rate_factors, reference.rate_falls = factors, c.rate_falls
    return reference


def quarters(rng, shape):
    """Sums of these are exact, also in bfloat16: what cancels, cancels."""
    return np.asarray(np.round(4 * rng.normal(size=shape)) / 4)


def make_gradients(c):
    """For each call and each replica a list of gradients: array, (rows, values) or None."""
    rng = np.random.default_rng(c.seed + 1)
    calls = []
    for call in range(c.calls):
        size = c.sizes[call]
        missing = rng.random(len(c.kinds)) < 0.5
        if c.graph and call == 0:
            # A step that was traced before the first gradient came never learns of it.
            missing[:] = False
        replicas = []
        for replica in range(max(c.replicas, 1)):
            grads = []
            for kind, gone, shape in zip(c.kinds, missing, c.shapes.values(), strict=True):
                g = np.asarray(size * quarters(rng, shape))
                if kind == "sparse":
                    rows = rng.integers(0, shape[0], size=3)
                    g = (rows, size * quarters(rng, (3, *shape[1:])))
                gone = kind == "frozen" or (kind == "sometimes" and gone)
                gone = gone or (kind in ("stops", "freezes") and call > 0)
                grads.append(None if gone else g)
            if c.bad and c.bad[:2] == (call, replica):
                first = grads[0][1] if isinstance(grads[0], tuple) else grads[0]
                first[(0,) * first.ndim] = c.bad[2]
            replicas.append(grads)
        calls.append(replicas)
    return calls


class Subject:
    """The optimizer of a configuration, its variables, and one call of it."""

    def __init__(self, c, config=None):
        self.c, self.strategy = c, cached_strategy(c.replicas)
        rng = np.random.default_rng(c.seed)
        with self.strategy.scope() if self.strategy else contextlib.nullcontext():
            self.variables = []
            for (path, shape), dtype in zip(c.shapes.items(), c.dtypes, strict=True):
                scope, _, name = path.rpartition("/")
                with keras.name_scope(scope):
                    value = quarters(rng, shape).astype("float32")
                    self.variables.append(keras.Variable(value, dtype=dtype, name=name))
                assert self.variables[-1].path == path
            self.outer = keras.optimizers.deserialize(config) if config else self._make()
            self.outer.build(self.variables)
        self.optimizer = getattr(self.outer, "inner_optimizer", self.outer)
        if not isinstance(self.optimizer, kgc.ClippedOptimizer):
            self.optimizer = self.outer
        self._step = tf.function(self._in_replicas, autograph=False) if c.graph else None

    def _make(self):
        c = self.c
        inner = INNER[c.inner](rate_of(c))
        if c.scaling == "fixed":
            inner.loss_scale_factor = SCALES["fixed"]
        optimizer = kgc.ClippedOptimizer(
            inner,
            c.clipper,
            gradient_accumulation_steps=c.micro_steps if c.micro_steps > 1 else None,
            skip_nonfinite=c.skip,
            telemetry=c.telemetry,
            compiled=c.compiled,
            skip_spikes=c.spikes,
        )
        if c.scaling == "dynamic":
            return keras.optimizers.LossScaleOptimizer(
                optimizer, initial_scale=SCALES["dynamic"], dynamic_growth_steps=GROWTH_STEPS
            )
        return optimizer

    def freeze(self, call):
        """From the second call on some variables are not trained."""
        for variable, kind in zip(self.variables, self.c.kinds, strict=True):
            if kind == "freezes" and call > 0:
                variable.trainable = False

    def call(self, replicas):
        (self._step or self._in_replicas)(replicas)

    def _in_replicas(self, replicas):
        def replica():
            index = 0
            if self.strategy:
                index = tf.distribute.get_replica_context().replica_id_in_sync_group
                index = index if isinstance(index, int) else int(tf.get_static_value(index))
            scale = SCALES[self.c.scaling] or 1.0
            if self.c.scaling == "dynamic":
                scale = arithmetic.read(self.outer.dynamic_scale)
            grads = [
                self._tensor(g, v, scale)
                for g, v in zip(replicas[index], self.variables, strict=True)
            ]
            pairs = list(zip(grads, self.variables, strict=True))
            if self.c.omit:
                pairs = [pair for pair in pairs if pair[0] is not None]
            self.outer.apply([g for g, _ in pairs], [v for _, v in pairs])

        self.strategy.run(replica) if self.strategy else replica()

    def _tensor(self, g, variable, scale):
        if g is None:
            return None
        scale = keras.ops.cast(scale, variable.dtype)
        if not isinstance(g, tuple):
            return keras.ops.cast(g, variable.dtype) * scale
        values = tf.cast(g[1], variable.dtype) * scale
        shape = tf.constant(tuple(variable.shape), "int64")
        return tf.IndexedSlices(values, tf.convert_to_tensor(g[0]), shape)

    def copies(self):
        """For each variable its copy on each replica, float64."""
        return [
            [to64(x) for x in (getattr(v.value, "values", [v.value]) if IS_TENSORFLOW else [v])]
            for v in self.variables
        ]

    def resumed(self, folder):
        """What a process that begins anew makes of this one's files."""
        config = json.loads(json.dumps(keras.optimizers.serialize(self.outer)))
        other = Subject(self.c, config)
        for a, b in zip(self.variables, other.variables, strict=True):
            b.assign(a)
        if self.c.by == "checkpoint":
            path = tf.train.Checkpoint(optimizer=self.outer).save(str(folder / "c"))
            tf.train.Checkpoint(optimizer=other.outer).restore(path)
            return other
        mine, yours = self.outer, other.outer
        while mine is not None:
            store = {}
            mine.save_own_variables(store)
            yours.load_own_variables(store)
            mine, yours = (getattr(o, "inner_optimizer", None) for o in (mine, yours))
        return other


def scaled(g, scale):
    if g is None:
        return None
    return (g[0], g[1] * scale) if isinstance(g, tuple) else g * scale


def change(optimizer, name, factor):
    """What a user sets in the middle of training; a number that the optimizer lacks stays."""
    if name == "threshold":
        thresholds = optimizer.clip_hyperparameters
        key = next((k for k, v in thresholds._values.items() if not is_schedule(v)), None)
        if key is not None:
            thresholds[key] = factor * thresholds[key]
        return
    inner = optimizer.inner_optimizer
    if name == "learning_rate":
        if not is_schedule(inner._learning_rate):
            inner.learning_rate = factor * float(to64(inner.learning_rate))
    elif getattr(inner, name, None) is not None:
        setattr(inner, name, factor * getattr(inner, name))


def change_reference(reference, name, factor):
    """`change` of the reference."""
    clips = [clip for clip in (reference.clip, reference.bound) if clip is not None]
    if name == "threshold":
        for clip in clips:
            clip.change(factor)
        return
    if name == "learning_rate" and not reference.rate_falls:
        reference.rate_factors.append(factor)
        for clip in clips:
            clip.forget_rate()
    if isinstance(reference, KerasUpdate):
        inner = reference.optimizer or reference.inner
        change(types.SimpleNamespace(inner_optimizer=inner), name, factor)


def is_schedule(value):
    return isinstance(value, keras.optimizers.schedules.LearningRateSchedule)


def check(folder, c):
    with pytest.MonkeyPatch.context() as patch:
        if c.is_lowered:
            patch.setattr(arithmetic, "SMALL", 2)  # a scalar never is
            patch.setattr(arithmetic, "WORTH_COMPILING", 1)
            patch.setattr(arithmetic, "WORTH_CONVOLVING", 8)
            patch.setattr(arithmetic, "LONG", 2)
            patch.setattr(_compiled, "WORTH_AN_OPERATION", 0)
        check_configuration(folder, c)


def check_configuration(folder, c):
    calls = make_gradients(c)
    subject, resumed = Subject(c), None
    reference = make_reference(c, [copies[0] for copies in subject.copies()])
    for i, replicas in enumerate(calls):
        if i == c.saved_at:
            resumed = subject.resumed(folder)
        for call, name, factor in c.changes:
            if call == i:
                for each in filter(None, (subject, resumed)):
                    change(each.optimizer, name, factor)
                change_reference(reference, name, factor)
        for each in filter(None, (subject, resumed)):
            each.freeze(i)
            each.call(replicas)
        if i == 1:
            reference.freeze([n for n, kind in enumerate(c.kinds) if kind == "freezes"])
        scale = reference.scale or 1.0
        reference.call([[scaled(g, scale) for g in grads] for grads in replicas])
    hypothesis.assume(not reference.is_close)
    check_alone(c, subject, calls[0][0])
    is_rounded = "bfloat16" in c.dtypes  # weight and gradient, in every update; norms are shared
    rtol, atol = (0.02, 0.05 * c.calls) if is_rounded else (1e-5, 3e-6)
    for path, copies, again, want in zip(
        c.shapes, subject.copies(), resumed.copies(), reference.weights, strict=True
    ):
        for copy in copies:
            np.testing.assert_allclose(copy, want, rtol=rtol, atol=atol, err_msg=path)
        # A file has one sum of micro-batches where each replica had one.
        is_summed_anew = is_rounded and c.replicas > 1 and c.saved_at % c.micro_steps > 0
        exact = {"rtol": rtol, "atol": atol} if is_summed_anew else {"rtol": 0}
        np.testing.assert_allclose(again, copies, **exact, err_msg=f"{path}, saved and resumed")
    for each in (subject, resumed):
        assert each.optimizer.skipped_steps == reference.skipped
        assert int(keras.ops.convert_to_numpy(each.optimizer.iterations)) == reference.updates
        if c.scaling == "dynamic":
            assert float(to64(each.outer.dynamic_scale)) == reference.scale
    if c.telemetry:
        seen = subject.optimizer.read_telemetry()
        assert (seen["updates"], seen["skipped"]) == (reference.updates, reference.skipped)


def check_alone(c, subject, grads):
    """A clipper in a loop of one's own keeps shapes and dtypes."""
    if c.clipper is None:
        return
    tensors = [subject._tensor(g, v, 1.0) for g, v in zip(grads, subject.variables, strict=True)]
    for before, after in zip(tensors, c.clipper(tensors, subject.variables), strict=True):
        assert (before is None) == (after is None)
        if before is not None:
            assert (after.dtype, tuple(after.shape)) == (before.dtype, tuple(before.shape))


def test_every_clipper_has_an_oracle():
    assert {*selectable().values()} == {*LIMITS, *MEMORIES}


def fuzz(strategy, examples, monkeypatch, folder, capsys, part=0):
    def run(configuration):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # norm clips that are undone, say so
            check(folder, configuration)

    monkeypatch.setattr(_skips, "WINDOW", WINDOW)
    fuzzed(run, examples, strategy, capsys, part)


@pytest.mark.timeout(0)
@pytest.mark.parametrize("part", range(PARTS))
def test_random_configurations(part, monkeypatch, tmp_path, capsys):
    fuzz(configurations(), 2 * EXAMPLES // 5, monkeypatch, tmp_path, capsys, part)


@st.composite
def bounding_biases(draw):
    """Biases look at kernels beside them, with or without a gradient: drawn too seldom above."""
    rule, default = (
        kgc.UpdateRatioClip(
            draw(st.sampled_from((0.002, 0.01))),
            scope=draw(st.sampled_from(("unit", "variable", "layer"))),
            biases="unit",
            anneal=draw(st.sampled_from((None, "learning_rate"))),
        )
        for _ in range(2)
    )
    clipper = kgc.ClipMap({".*_0/.*": rule}, default=default) if draw(st.booleans()) else rule
    return dataclasses.replace(draw(configurations()), clipper=clipper)


@pytest.mark.timeout(0)
def test_bounded_biases(monkeypatch, tmp_path, capsys):
    fuzz(bounding_biases(), EXAMPLES * 16 // 100, monkeypatch, tmp_path, capsys)
