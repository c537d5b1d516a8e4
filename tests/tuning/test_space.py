"""The search space: conditions, round trips, groups."""

import json

import keras
import keras_tuner as kt
import numpy as np
import pytest

import keras_gradclip as kgc
from keras_gradclip.clippers import threshold_of as threshold_name
from keras_gradclip.tuning.space import (
    CLIPPERS,
    calibrated_ranges,
    clip_hyperparameters,
    combinations,
    layer_groups,
    threshold_of,
    to_clipper,
    to_gate,
)

WHOLE = {
    "scope": ("layer", "global"),
    "beta": (0.5, 1.0),
    "activation_gate": True,
    "learning_rate": (1e-4, 1e-2),
}
GROUPS = {"stem": "conv1/.*", "head": "predictions/.*", "stages": ".*"}


def space_of(**options):
    hp = kt.HyperParameters()
    values = clip_hyperparameters(hp, **options)
    return hp, values


def samples(hp, number=60):
    """Random trials, as an oracle draws them."""
    oracle = kt.oracles.RandomSearchOracle("val_loss", number, hyperparameters=hp, seed=1)
    for i in range(number):
        yield oracle.populate_space(str(i))["values"]


def small_net():
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, name="conv1")(inputs)
    x = keras.layers.BatchNormalization(name="bn1")(x)
    x = keras.layers.Conv2D(4, 3, name="conv2")(x)
    x = keras.layers.Conv2D(4, 3, name="conv3")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(2, "softmax", name="predictions")(x))


def test_a_trial_carries_what_it_uses_and_nothing_else():
    hp, _ = space_of(**WHOLE)
    seen = set()
    for values in samples(hp):
        kind = values["clipper"]
        seen.add(kind)
        for name in values:
            family = name.partition("/")[0]
            assert family in ("clipper", "learning_rate", "activation_gate", "gate", kind), name
        assert ("gate/clip_value" in values) == values["activation_gate"]
        expected = {
            "none": set(),
            "absolute": {"absolute/threshold"},
            "norm": {"norm/max_norm", "norm/scope"},
            "update_ratio": {"update_ratio/max_ratio", "update_ratio/scope"},
            "exponential": {"exponential/gamma", "exponential/beta"},
        }[kind]
        assert {name for name in values if name.startswith(f"{kind}/")} == expected
    assert seen == set(CLIPPERS)


def test_five_dimensions_are_searched_by_default():
    hp, _ = space_of()
    names = [parameter.name for parameter in hp.space]
    thresholds = ("absolute/threshold", "exponential/gamma", "norm/max_norm")
    assert names == ["clipper", *thresholds, "update_ratio/max_ratio"]


def test_every_value_is_within_its_range_and_makes_a_clipper():
    hp, _ = space_of(**WHOLE, threshold=(0, 1))
    configs = {parameter.name: parameter.get_config() for parameter in hp.space}
    ranges = {n: (c["min_value"], c["max_value"]) for n, c in configs.items() if "min_value" in c}
    for values in samples(hp):
        clipper = to_clipper(values)
        assert (clipper is None) == (values["clipper"] == "none")
        for name, (low, high) in ranges.items():
            assert low <= values.get(name, low) <= high
    assert ranges["absolute/threshold"] == pytest.approx((1e-4, 1))
    assert ranges["exponential/beta"] == (0.5, 1.0)


def test_a_trial_has_the_clipper_of_its_values():
    hp, _ = space_of(**WHOLE)
    for values in samples(hp):
        clipper = to_clipper(values)
        assert kgc.get(kgc.serialize(clipper)) == clipper
        alias = values["clipper"]
        for name, value in values.items():
            if name.startswith(f"{alias}/"):
                own = getattr(clipper, name.rpartition("/")[2])
                assert ("none" if own is None else own) == pytest.approx(value)


def test_float32_on_the_way_does_not_change_the_clipper():
    values = {"clipper": "absolute", "absolute/threshold": 0.0123456}
    through = {**values, "absolute/threshold": float(np.float32(0.0123456))}
    assert through != values
    assert to_clipper(through) == to_clipper(values) == kgc.AbsoluteClip(0.0123456)


@pytest.mark.parametrize("kind", ["absolute", "exponential", "norm"])
def test_groups_have_thresholds_of_their_own(kind):
    hp, _ = space_of(clippers=[kind], groups=GROUPS)
    values = next(iter(samples(hp)))
    assert [name.rpartition("/")[2] for name in threshold_of(values)] == list(GROUPS)
    assert len(set(threshold_of(values).values())) == 3
    clipper = to_clipper(values, GROUPS)
    model = small_net()
    assert [rule for rule, _ in clipper.rule_of(model.trainable_variables)] == [
        "conv1/.*", "conv1/.*", *[".*"] * 6, "predictions/.*", "predictions/.*"
    ]  # fmt: skip
    thresholds = [getattr(rule, threshold_name(type(rule))) for _, rule in clipper.rules]
    assert thresholds == pytest.approx(list(threshold_of(values).values()))
    with pytest.raises(ValueError, match="Pass the same `groups`"):
        to_clipper(values)


def test_layer_groups_split_stem_stages_and_head():
    groups = layer_groups(small_net())
    assert list(groups) == ["stem", "head", "stages"]  # the order in which they are tried
    clipper = kgc.ClipMap([(rx, kgc.AbsoluteClip(0.1)) for rx in groups.values()])
    names = {rx: name for name, rx in groups.items()}
    variables = small_net().trainable_variables
    found = {
        v.path: names[rule]
        for v, (rule, _) in zip(variables, clipper.rule_of(variables), strict=True)
    }
    assert found["conv1/kernel"] == found["bn1/gamma"] == "stem"
    assert found["conv2/kernel"] == found["conv3/bias"] == "stages"
    assert found["predictions/kernel"] == found["predictions/bias"] == "head"
    with pytest.raises(ValueError, match="three or more"):
        layer_groups(keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]))


def test_the_default_trial_is_the_unclipped_baseline():
    _, values = space_of(learning_rate=(1e-4, 1e-2), default_learning_rate=5e-3)
    assert values == {"clipper": "none", "learning_rate": 5e-3}
    assert to_clipper(values) is None and to_gate(values, 1e-3) is None


def test_gate():
    values = {"activation_gate": True, "gate/clip_value": 0.2, "gate/gamma": 0.5}
    assert to_gate(values, 1e-3) == kgc.ActivationGate(0.2, 0.5, 1e-3)


def test_points_make_a_grid_with_its_ends():
    hp, _ = space_of(clippers=["none", "absolute"], points=3, rescale=("none", "norm"))
    grid = list(combinations(hp))
    assert len(grid) == 1 + 3 * 2
    assert grid[0] == {"clipper": "none"}
    thresholds = sorted({values["absolute/threshold"] for values in grid[1:]})
    assert thresholds == pytest.approx([0.01, 0.1**1.5, 0.1])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"clippers": ["clipvalue"]}, "`clippers` must be some of"),
        ({"clippers": []}, "`clippers` must be some of"),
        ({"rescale": ["alpha"], "clippers": ["absolute"]}, "holds nothing for 'absolute'"),
        ({"threshold": (0.1, 0.01)}, "range of 'absolute/threshold'"),
        ({"gamma": (-1, 0.01)}, "range of 'exponential/gamma'"),
        ({"learning_rate": (0.1, 1), "default_learning_rate": 2.0}, "default of 'learning_rate'"),
        ({"points": 1}, "`points`=1 must be 2 or more"),
        ({"points": "3"}, "`points`='3' must be 2 or more"),
        ({"learning_rate": 0.1}, r"'learning_rate' must be .*is 0.1, not \(low, high\)"),
        ({"threshold": [0.1]}, "range of 'absolute/threshold'"),
        ({"threshold": ("low", "high")}, "range of 'absolute/threshold'"),
        ({"groups": ["conv.*"]}, "`groups` must be a dict"),
        ({"scope": "layre"}, "`scope` must be some of .*, but has 'layre'"),
        ({"exponential/weight": ("rms", "rsm")}, "`exponential/weight` .*, but has 'rsm'"),
        ({"rescale": (None, "norm")}, "`rescale` must be some of .*, but has None"),
        ({"rescale": 3}, "`rescale` must be some of .*, but has 3"),
        ({"clippers": None}, "`clippers` must be some of"),
        ({"clippers": [["norm"]]}, "`clippers` must be some of"),
    ],
)
def test_wrong_spaces_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        space_of(**options)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: to_clipper({}), "must hold 'clipper'"),
        (lambda: to_clipper({"clipper": "agc"}), "'agc'"),
        (lambda: to_clipper({"clipper": "absolute"}), "lack 'absolute/threshold'"),
        (lambda: to_clipper(None), "to_clipper: `values` must be a dict"),
        (lambda: to_clipper(kt.HyperParameters()), "to_clipper: `values` must be a dict"),
        (lambda: to_gate([], 1.0), "to_gate: `values` must be a dict"),
        (lambda: layer_groups(3), "layer_groups: `model` must be a built keras.Model"),
        (lambda: layer_groups(keras.Sequential()), "has 0 layers with kernels.* Build the model"),
        (lambda: clip_hyperparameters(None), "`hp` must be .* call `suggest`"),
    ],
)
def test_clippers_outside_of_the_space_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_ranges_centred_on_a_calibration(tmp_path):
    path = tmp_path / "calibration.json"
    figures = {"norm": {"a": 0.5, "b": 2.0, "c": 8.0}, "absolute": {"a": None}}
    path.write_text(json.dumps({"calibration": {"thresholds": figures}}))
    found = calibrated_ranges(path)
    assert set(found) == {"max_norm"}
    low, high = found["max_norm"]
    assert low * high == pytest.approx(2.0**2)
    assert high / low == pytest.approx(10)
    path.write_text("{}")
    with pytest.raises(ValueError, match="calibrate"):
        calibrated_ranges(path)


def test_what_calibrate_saves_centres_the_ranges(tmp_path):
    model = kgc.ClippedModel(*_graph())
    model.compile("sgd", "mse")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 4)).astype("float32"), rng.normal(size=(32, 1)).astype("float32")
    kgc.calibrate(model, (x, y), steps=4, batch_size=8).save(tmp_path / "c.json")
    found = calibrated_ranges(tmp_path / "c.json")
    hp = kt.HyperParameters()
    clip_hyperparameters(hp, ["none", "absolute", "exponential", "norm"], **found)
    declared = {p.name: p for p in hp.space}
    assert declared["norm/max_norm"].min_value == pytest.approx(found["max_norm"][0])
    assert declared["absolute/threshold"].max_value == pytest.approx(found["threshold"][1])


def _graph():
    inputs = keras.Input((4,))
    return inputs, keras.layers.Dense(1)(keras.layers.Dense(3)(inputs))
