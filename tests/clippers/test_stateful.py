"""Clippers with a memory: many steps against NumPy, replicas, saving, XLA, bad gradients."""

import json

import keras
import numpy as np
import pytest
from helpers import gradients, to64, train, variables, weights
from keras import ops
from oracles import Clip

import keras_gradclip as kgc
from keras_gradclip.names import path_of

STEPS = 36  # of which a window has 16, a warm-up 8 or 10


CASES = {
    "percentile": lambda scope: kgc.PercentileClip(60.0, window=16, scope=scope),
    "zscore": lambda scope: kgc.ZScoreClip(1.5, alpha=0.9, warmup_steps=8, scope=scope),
    "zscore-mean": lambda scope: kgc.ZScoreClip(
        1.5, alpha=0.9, warmup_steps=8, option="mean", scope=scope
    ),
    "ada": lambda scope: kgc.AdaClip(1.5, 12.0, beta=0.9, warmup_steps=10, scope=scope),
}
SMALL = {  # for training runs of a few steps
    "percentile": kgc.PercentileClip(50.0, window=4, scope="layer"),
    "zscore": kgc.ZScoreClip(0.5, warmup_steps=2, scope="layer"),
    "ada": kgc.AdaClip(1.2, 1e3, warmup_steps=2),
}


def hyper_of(clipper):
    return {k: ops.convert_to_tensor(v, "float32") for k, v in clipper.hyperparameters().items()}


def spiky(step):
    """A gradient whose size wanders and jumps up now and then."""
    rng = np.random.default_rng(step)
    scale = np.exp(0.3 * rng.normal()) * (8.0 if step % 7 == 6 else 1.0)
    return gradients(variables(), step, scale=scale)


@pytest.mark.parametrize(
    ("case", "scope"),
    [
        *((case, scope) for case in SMALL for scope in ("global", "layer", "variable")),
        ("zscore-mean", "layer"),
    ],
)
def test_against_the_oracle_for_many_steps(case, scope):
    clipper = CASES[case](scope)
    twin, vs = Clip(clipper), variables()
    w64, paths = [to64(v) for v in vs], [path_of(v) for v in vs]
    state = clipper.init(vs)
    fractions = []
    for step in range(STEPS):
        gs, g64 = spiky(step)
        got, state, stats = clipper.apply(gs, vs, state, hyper_of(clipper))
        wanted = twin(g64, w64, paths, step)
        for g, want in zip(got, wanted, strict=True):
            np.testing.assert_allclose(to64(g), want, rtol=2e-4, atol=1e-6)
        pairs = zip(wanted, g64, strict=True)
        hit = [float(np.linalg.norm(w) < np.linalg.norm(g) * (1 - 1e-6)) for w, g in pairs]
        np.testing.assert_array_equal([float(f) for f in stats.fractions()], hit)
        fractions.append(np.mean(hit))
    assert 0.02 < np.mean(fractions) < 0.98, "the test needs steps with and without a clip"


@pytest.mark.parametrize("case", CASES)
def test_compiled_is_eager(case):
    tf = pytest.importorskip("tensorflow")
    clipper = CASES[case]("layer")
    vs = variables()
    hyper = hyper_of(clipper)

    def step(grads, state):
        return clipper.apply(grads, vs, state, hyper)[:2]

    compiled = tf.function(step, jit_compile=True)
    a = b = {k: ops.convert_to_tensor(v) for k, v in clipper.init(vs).items()}
    for i in range(14):
        gs, _ = spiky(i)
        eager, a = step(gs, a)
        jitted, b = compiled(gs, b)
        for x, y in zip(eager, jitted, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)
    for key in a:
        np.testing.assert_allclose(a[key], b[key], rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_bad_gradient_is_not_remembered(case, scope):
    """One infinity among the gradients leaves no trace in the memory of its scope."""
    clipper = CASES[case](scope)
    vs = variables()
    state = clipper.init(vs)
    for step in range(12):
        gs, _ = spiky(step)
        _, state, _ = clipper.apply(gs, vs, state, hyper_of(clipper))
    bad = np.array(ops.convert_to_numpy(gs[0]))
    bad[0, 0, 0, 0] = np.inf
    got, after, _ = clipper.apply(
        [ops.convert_to_tensor(bad), *gs[1:]], vs, state, hyper_of(clipper)
    )
    assert np.isnan(to64(got[0])).any()
    assert all(np.isfinite(to64(g)).all() for g in got[1:])
    for key, value in after.items():
        assert np.isfinite(to64(value)).all()
        if key not in ("count", "slot", "filled"):
            np.testing.assert_array_equal(to64(value)[0], to64(state[key])[0])


@pytest.mark.parametrize("case", CASES)
def test_zero_and_none_gradients(case):
    clipper = CASES[case]("variable")
    vs = variables()
    gs = [ops.zeros(v.shape) for v in vs]
    gs[1] = None
    state = clipper.init(vs)
    for _ in range(12):
        got, state, stats = clipper.apply(gs, vs, state, hyper_of(clipper))
        assert got[1] is None
        assert all(np.all(to64(g) == 0) for g in got if g is not None)
        assert stats.weights == [1.0, 0.0, 1.0, 1.0, 1.0]
    got, _, _ = clipper.apply([None] * len(vs), vs, state, hyper_of(clipper))
    assert got == [None] * len(vs)


# Fewer and more zeros than any window or warm-up.
@pytest.mark.parametrize(("scope", "zeros"), [("global", 20), ("variable", 1)])
@pytest.mark.parametrize("case", CASES)
def test_a_gradient_of_zero_is_no_evidence(case, scope, zeros):
    """Heads, experts and masked batches without an example: the memory is that of the others."""
    clipper = CASES[case](scope)
    vs = variables()
    with_zeros = without = clipper.init(vs)
    for step in range(15):
        gs, _ = spiky(step)
        for _ in range(zeros if step in (0, 12) else 0):
            nothing = [ops.zeros_like(g) for g in gs]
            _, with_zeros, _ = clipper.apply(nothing, vs, with_zeros, hyper_of(clipper))
        _, with_zeros, _ = clipper.apply(gs, vs, with_zeros, hyper_of(clipper))
        _, without, _ = clipper.apply(gs, vs, without, hyper_of(clipper))
    for key in without:
        if case != "ada":  # whose warm-up counts updates, as in the paper
            np.testing.assert_array_equal(to64(with_zeros[key]), to64(without[key]))
        assert to64(with_zeros[key]).min() > 0 or key in ("slot",)


@pytest.mark.parametrize(
    "clipper",
    [
        kgc.PercentileClip(90.0, window=1000, scope="variable"),
        kgc.PercentileClip(90.0, window=20, scope="variable"),
        kgc.ZScoreClip(scope="variable"),
        kgc.ZScoreClip(option="mean", scope="variable"),
        kgc.AdaClip(lambda_abs=10.0),
    ],
    ids=str,
)
def test_heads_that_are_seldom_used_train(clipper):
    every = np.array([3, 12, 30])
    heads = [keras.Variable(np.zeros(4, "float32"), name=f"head{n}") for n in every]
    state, hyper = clipper.init(heads), hyper_of(clipper)
    free = moved = np.zeros(3)
    rng = np.random.default_rng(0)
    for step in range(120):
        sizes = np.where(step % every == every - 1, rng.uniform(0.8, 1.2, 3), 0.0)
        gs, state, _ = clipper.apply([ops.full((4,), s) for s in sizes], heads, state, hyper)
        free, moved = free + sizes, moved + [to64(g)[0] for g in gs]
    assert (moved > 0.5 * free).all()


def test_zscore_takes_no_ordinary_difference_for_a_spike():
    """After a warm-up of equal norms, the deviation alone would be 0."""
    v = keras.Variable(np.zeros(4, "float32"))
    clipper = kgc.ZScoreClip(warmup_steps=5)
    state = clipper.init([v])
    for size in (1.0,) * 8 + (1.2,):
        (got,), state, _ = clipper.apply([size * ops.ones(4)], [v], state, hyper_of(clipper))
        np.testing.assert_allclose(to64(got), size, rtol=1e-6)
    (got,), _, _ = clipper.apply([10.0 * ops.ones(4)], [v], state, hyper_of(clipper))
    assert to64(got).max() < 1.2


def test_ada_lets_a_zero_initialised_tensor_wake_up():
    """A tensor without a gradient during the warm-up is not frozen afterwards."""
    v = keras.Variable(np.zeros(4, "float32"), name="gamma")
    clipper = kgc.AdaClip(warmup_steps=3)
    state = clipper.init([v])
    for _ in range(5):
        _, state, _ = clipper.apply([ops.zeros(4)], [v], state, hyper_of(clipper))
    (got,), state, _ = clipper.apply([ops.ones(4)], [v], state, hyper_of(clipper))
    np.testing.assert_array_equal(to64(got), 1.0)
    (got,), state, _ = clipper.apply([10.0 * ops.ones(4)], [v], state, hyper_of(clipper))
    np.testing.assert_allclose(to64(got), 1.05, rtol=1e-6)


def test_zscore_leaves_ordinary_steps_alone():
    """A spike of 8 times the norm is clipped; the steps around it are not."""
    vs = variables()
    clipper = kgc.ZScoreClip(warmup_steps=10)
    state = clipper.init(vs)
    clipped = []
    for step in range(40):
        gs, g64 = gradients(vs, step, scale=8.0 if step == 30 else 1.0)
        got, state, _ = clipper.apply(gs, vs, state, hyper_of(clipper))
        before = np.sqrt(sum((g**2).sum() for g in g64))
        after = np.sqrt(sum((to64(g) ** 2).sum() for g in got))
        if after < 0.99 * before:
            clipped.append((step, after))
    assert 30 in [s for s, _ in clipped]
    assert len(clipped) <= 4
    assert dict(clipped)[30] < 2 * np.sqrt(sum(np.prod(v.shape) for v in vs))


def optimizer_of(case):
    return lambda: kgc.ClippedOptimizer(keras.optimizers.Adam(0.01), SMALL[case], telemetry=True)


@pytest.mark.parametrize("case", SMALL)
def test_replica_parity(case):
    one_model, _, one = train(0, optimizer_of(case))
    assert 0.05 < one_model.optimizer.read_telemetry()["clip_fraction"] < 0.98
    two_model, _, two = train(2, optimizer_of(case))
    np.testing.assert_allclose(two, one, atol=1e-5, rtol=0)
    strategy = two_model.optimizer.strategy
    for variable in two_model.optimizer._clip.state.values():
        copies = [np.asarray(c) for c in strategy.experimental_local_results(variable.value)]
        assert len(copies) == 2
        np.testing.assert_array_equal(copies[0], copies[1])


@pytest.mark.parametrize("case", SMALL)
def test_a_resumed_run_goes_on_bit_for_bit(case, tmp_path):
    from helpers import data, loss, net

    x, y = data(96)

    def model():
        m = net()
        m.compile(
            kgc.ClippedOptimizer(keras.optimizers.Adam(0.01), SMALL[case]),
            loss(),
            loss_weights=30.0,
        )
        return m

    def fit(m, part):
        m.fit(x[part], y[part], batch_size=16, shuffle=False, verbose=0)

    whole = model()
    fit(whole, slice(0, 48))
    whole.save(tmp_path / "half.keras")
    fit(whole, slice(48, 96))
    resumed = keras.models.load_model(tmp_path / "half.keras")
    state = resumed.optimizer._clip.state
    assert any(ops.convert_to_numpy(v).any() for v in state.values())
    fit(resumed, slice(48, 96))
    np.testing.assert_array_equal(weights(resumed), weights(whole))
    for key, value in whole.optimizer._clip.state.items():
        np.testing.assert_array_equal(ops.convert_to_numpy(value), ops.convert_to_numpy(state[key]))


def test_accumulation_remembers_updates_and_not_micro_batches():
    def optimizer():
        return kgc.ClippedOptimizer(
            keras.optimizers.SGD(0.01), SMALL["percentile"], gradient_accumulation_steps=4
        )

    model, _, _ = train(0, optimizer, steps=8)
    np.testing.assert_array_equal(ops.convert_to_numpy(model.optimizer._clip.state["filled"]), 2)


@pytest.mark.parametrize("clipper", [*SMALL.values()], ids=str)
def test_round_trip_and_nesting(clipper):
    assert kgc.get(json.loads(json.dumps(kgc.serialize(clipper)))) == clipper
    nested = kgc.ClipMap({"conv/.*": clipper}, default=kgc.Chain([clipper, kgc.NormClip(0.1)]))
    vs = variables()
    state = nested.init(vs)
    names = {k.rpartition("/")[0] for k in state}
    assert names == {"conv/.*", "default/0"}
    _, after, _ = nested.apply(gradients(vs)[0], vs, state, hyper_of(nested))
    assert after.keys() == state.keys()
    assert any(np.any(to64(after[k]) != to64(ops.convert_to_tensor(state[k]))) for k in state)


def test_a_schedule_drives_the_percentile():
    schedule = keras.optimizers.schedules.PolynomialDecay(90.0, 10, 10.0)
    clipper = kgc.PercentileClip(schedule)
    assert kgc.get(kgc.serialize(clipper)).percentile.get_config() == schedule.get_config()


@pytest.mark.parametrize("name", ["percentile", "zscore", "ada"])
def test_get_by_name(name):
    assert type(kgc.get(name)) is type(SMALL[name])


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: kgc.PercentileClip(101.0), "percentile"),
        (lambda: kgc.PercentileClip(0.0), "percentile"),
        (lambda: kgc.PercentileClip(window=0), "window"),
        (lambda: kgc.PercentileClip(scope="net"), "scope"),
        (lambda: kgc.ZScoreClip(alpha=1.0), "alpha"),
        (lambda: kgc.ZScoreClip(warmup_steps=None), "warmup_steps"),
        (lambda: kgc.ZScoreClip(option="median"), "option"),
        (lambda: kgc.AdaClip(beta=-0.1), "beta"),
        (lambda: kgc.AdaClip(lambda_rel=None), "lambda_rel"),
    ],
)
def test_misuse_is_named(make, word):
    with pytest.raises(ValueError, match=word):
        make()


def test_the_code_on_the_cards_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="the code ends with a report")
    import re
    import tempfile
    from pathlib import Path

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    text = (Path(kgc.__file__).parents[1] / "docs/clippers.md").read_text(encoding="utf-8")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(compile(block, "clippers.md", "exec"), names)
    assert names["page"].exists()
    assert "hidden/kernel" in capsys.readouterr().out
    for name in re.findall(r"^\| `(\w+)\(", text, re.M):
        assert name in kgc.__all__
