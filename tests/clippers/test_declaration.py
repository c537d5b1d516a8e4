"""What clippers say about themselves, and a toy clipper that is found with no other edit."""

import dataclasses
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_gradclip as kgc
from keras_gradclip.clippers import cards, parameters, selectable, threshold_of
from keras_gradclip.clippers.base import ALIASES


def test_every_clipper_declares_all_its_fields_and_one_threshold():
    assert {"clip_map", "chain"} == {a for a in ALIASES if a not in selectable()}
    for alias, cls in selectable().items():
        declared = parameters(cls)
        assert [p.name for p in declared] == [f.name for f in dataclasses.fields(cls)]
        assert all(p.help for p in declared), alias
        assert sum(p.threshold for p in declared) == 1, alias
        assert cls.card is not None, alias
        for p in declared:
            assert p.check(alias, p.default) == p.default
            if p.range is not None:
                low, high = p.range
                assert 0 < low < high
                cls(**{p.name: low}), cls(**{p.name: high})
        assert cls().hyperparameters().keys() == {p.name for p in declared if p.live}
        assert threshold_of(cls) in cls().hyperparameters()


def test_a_clipper_written_for_0_1_still_works():
    @dataclasses.dataclass(frozen=True)
    class Old(kgc.Clipper):
        limit: float = 0.5
        live = ("limit",)

    assert Old().hyperparameters() == {"limit": 0.5}
    with pytest.raises(ValueError, match="limit"):
        Old(-1.0)


@pytest.mark.parametrize("name", ["divisor", "rate_is_set"])
def test_a_parameter_may_have_any_name(name):
    fields = [(name, float, kgc.parameter(4.0, help="4", live=True))]
    methods = {"scope": "global", "limit": lambda self, weight, hyper: hyper[name]}
    own = dataclasses.make_dataclass("Own", fields, bases=(kgc.Clipper,), frozen=True)
    for attribute, value in methods.items():
        setattr(own, attribute, value)
    (clipped,) = own()([keras.ops.convert_to_tensor([6.0, 8.0])], [keras.Variable([1.0, 1.0])])
    np.testing.assert_allclose(clipped, [2.4, 3.2], rtol=1e-6)


@pytest.mark.parametrize("inner", ["SGD", "Adam"])
@pytest.mark.parametrize("stage", ["update", "gradient"])
def test_a_custom_limit_gets_the_learning_rate(inner, stage):
    class Own(kgc.Clipper):
        scope = "global"

        def limit(self, weight, hyper):
            return 0.01 if stage == "update" else 0.01 / hyper["learning_rate"]

    Own.stage = stage
    variable = keras.Variable(np.ones((4, 3), "float32"))
    optimizer = kgc.ClippedOptimizer(getattr(keras.optimizers, inner)(0.1), kgc.Chain([Own()]))
    optimizer.build([variable])
    optimizer.apply([5 * keras.ops.ones((4, 3))], [variable])
    size = np.linalg.norm(keras.ops.convert_to_numpy(variable) - 1)
    want = 0.01 if (inner, stage) != ("Adam", "gradient") else 0.1 * np.sqrt(12)
    np.testing.assert_allclose(size, want, rtol=1e-3)


@pytest.mark.parametrize("inner", ["SGD", "Adam"])
def test_a_memory_of_updates_is_one_of_updates(inner):
    class Own(kgc.Clipper):
        scope, stage = "global", "update"

        def memory(self, scopes):
            return {"last": np.zeros((scopes,), "float32")}

        def limits(self, norms, usable, state, hyper):
            return 0.01 * keras.ops.ones_like(norms), {"last": norms}

    variable = keras.Variable(np.ones((4, 3), "float32"))
    optimizer = kgc.ClippedOptimizer(getattr(keras.optimizers, inner)(0.1), Own())
    optimizer.build([variable])
    optimizer.apply([keras.ops.ones((4, 3))], [variable])  # Adam's first update has this size, too
    last = keras.ops.convert_to_numpy(optimizer._clip.state["last"])
    np.testing.assert_allclose(last, 0.1 * np.sqrt(12), rtol=1e-3)
    size = np.linalg.norm(keras.ops.convert_to_numpy(variable) - 1)
    np.testing.assert_allclose(size, 0.01, rtol=1e-3)


@pytest.mark.parametrize("name", ["scope", "stage", "biases", "rescale"])
def test_an_unknown_word_in_a_custom_clipper_is_refused(name):
    class Own(kgc.AbsoluteClip):
        pass

    object.__setattr__(clipper := Own(), name, "layers")
    with pytest.raises(ValueError, match=f"Own: `{name}` must be one of .* but is 'layers'"):
        kgc.Chain([clipper]).describe([keras.Variable([1.0])])


@pytest.mark.parametrize("cls", [kgc.NormClip, kgc.Chain, kgc.ClipMap])
def test_a_custom_apply_is_called_everywhere(cls):
    class Own(cls):
        def apply(self, *args):
            clipped, state, stats = super().apply(*args)
            return [2 * g for g in clipped], state, stats

    part = kgc.NormClip(0.5, "global")
    arguments = {kgc.NormClip: (0.5, "global"), kgc.Chain: ([part],), kgc.ClipMap: ({".*": part},)}
    own, variable = Own(*arguments[cls]), keras.Variable([0.0, 0.0])
    gradient = keras.ops.convert_to_tensor([3.0, 4.0])
    np.testing.assert_allclose(own([gradient], [variable])[0], [0.6, 0.8], rtol=1e-6)
    for clipper in (own, kgc.Chain([own])):
        optimizer = kgc.ClippedOptimizer(keras.optimizers.SGD(1.0), clipper)
        variable.assign([0.0, 0.0])
        optimizer.build([variable])
        optimizer.apply([gradient], [variable])
        got = keras.ops.convert_to_numpy(variable)
        np.testing.assert_allclose(got, [-0.6, -0.8], rtol=1e-6)
    assert type(own.with_hyperparameters({})) is Own


def test_hints():
    with pytest.raises(dataclasses.FrozenInstanceError, match=r'clip_hyperparameters\["threshold"'):
        kgc.AbsoluteClip().threshold = 0.2
    with pytest.raises(ValueError, match=r"clipper\(\[gradient\], \[variable\]\)"):
        kgc.AbsoluteClip()(1.0, 2.0)
    with pytest.raises(ValueError, match=r"write ClipMap"):
        kgc.get({".*/bias": None})
    with pytest.warns(UserWarning, match="scale of 0 to 100"):
        kgc.PercentileClip(0.9)


def test_nested_rules_of_one_name_are_refused():
    """Each has its own threshold: before, the second one's replaced the first one's."""
    nested = kgc.ClipMap({"bias": kgc.AbsoluteClip(5.0)})
    for outer in (kgc.AbsoluteClip(0.1), kgc.Chain([kgc.NormClip()])):
        with pytest.raises(ValueError, match=r"would both be called '\.\*/bias'"):
            kgc.ClipMap([(".*/bias", outer), (".*", nested)])
    kgc.ClipMap([(".*/kernel", kgc.AbsoluteClip(0.1)), (".*", nested)])


class Phased(keras.layers.Dense):
    def build(self, shape):
        self.phase = self.add_weight((2,), dtype="complex64", trainable=False, name="phase")
        super().build(shape)


def test_a_frozen_complex_variable_of_the_network_is_no_matter():
    layer = Phased(2)
    layer.build((None, 3))
    kgc.ClippedOptimizer("sgd", "norm").build(layer.trainable_variables)


def test_complex_variables_are_refused_and_can_be_excluded():
    z = keras.Variable(np.zeros(2, "complex64"), dtype="complex64", name="z")
    g = keras.ops.convert_to_tensor(np.array([1 + 1j, 2j], "complex64"))
    for clipper in (kgc.NormClip(), kgc.AdaptiveClip(), kgc.Chain([kgc.AbsoluteClip()])):
        with pytest.raises(ValueError, match=r"complex64.*Exclude it"):
            clipper([g], [z])
    assert kgc.ClipMap({"z": None})([g], [z])[0] is g


@pytest.mark.parametrize("alias", [a for a in selectable() if a != "exponential"])
def test_float64_is_exact_where_nothing_is_clipped_and_finite_where_it_is_huge(alias):
    cls = selectable()[alias]
    far = 100.0 if alias == "percentile" else 1e6
    if keras.backend.standardize_dtype(keras.ops.ones((), "float64").dtype) != "float64":
        pytest.skip("JAX holds no float64 unless it is told to")
    v = keras.Variable(np.ones(2), dtype="float64", name="v")
    for values in ([1 / 3, 2 / 3], [1e200, 1.0]):
        (got,) = cls(**{threshold_of(cls): far})(
            [keras.ops.convert_to_tensor(values, "float64")], [v]
        )
        if values[1] < 1 and alias != "ada":
            np.testing.assert_array_equal(keras.ops.convert_to_numpy(got), values)
        assert np.isfinite(keras.ops.convert_to_numpy(got)).all()


def test_the_table_in_the_docs_is_that_of_the_cards():
    text = (Path(__file__).parents[2] / "docs/clippers.md").read_text(encoding="utf-8")
    assert cards.table() in text, f"put this table into docs/clippers.md:\n\n{cards.table()}"
