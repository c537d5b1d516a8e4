"""`ClipHyperModel` in KerasTuner's own tuners, and the README's example."""

import math
import re
from pathlib import Path

import keras
import keras_tuner as kt
import numpy as np
import pytest

import keras_gradclip as kgc
from keras_gradclip import tuning
from keras_gradclip.optimizer.clipped_optimizer import find
from keras_gradclip.tuning import ClipHyperModel, as_objective, to_clipper

README = Path(__file__).resolve().parents[2] / "tuning" / "README.md"


def data():
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    return x, (x[:, :1] > 0).astype("float32")


def build_model(hp, model_class=keras.Model, optimizer="sgd", compiled=True):
    inputs = keras.Input((4,))
    x = keras.layers.Dense(hp.Choice("units", [4, 8]), "relu", name="first")(inputs)
    model = model_class(inputs, keras.layers.Dense(1, "sigmoid", name="last")(x))
    if compiled:
        model.compile(optimizer, "binary_crossentropy", metrics=["accuracy"])
    return model


def trial(**values):
    hp = kt.HyperParameters()
    hp.values = values
    return hp


@pytest.mark.parametrize("model_class", [keras.Model, kgc.ClippedModel])
def test_a_trial_trains_with_its_clipper_and_learning_rate(model_class):
    values = {"clipper": "absolute", "absolute/threshold": 1e-3, "learning_rate": 0.5}
    hyper = ClipHyperModel(
        lambda hp: build_model(hp, model_class), learning_rate=(1e-3, 1.0), rescale=("none",)
    )
    hp = trial(**values)
    model = hyper.build(hp)
    assert model.optimizer.clipper == kgc.AbsoluteClip(1e-3) == to_clipper(hp.values)
    before = [keras.ops.convert_to_numpy(v) for v in model.trainable_variables]
    x, y = data()
    history = hyper.fit(hp, model, x, y, batch_size=64, epochs=1, verbose=0)
    moved = max(
        np.abs(keras.ops.convert_to_numpy(v) - b).max()
        for v, b in zip(model.trainable_variables, before, strict=True)
    )
    assert moved == pytest.approx(0.5 * 1e-3, rel=1e-3)  # lr · c
    assert history.history["grad_norm"][0] > 0
    assert 0 < history.history["clip_fraction"][0] <= 1


def test_the_gate_is_put_in():
    values = {
        "clipper": "none", "activation_gate": True, "gate/clip_value": 0.01, "gate/gamma": 0.5
    }  # fmt: skip
    hyper = ClipHyperModel(build_model, activation_gate=True)
    x, y = data()
    grads = []
    for gated in (True, False):
        keras.utils.set_random_seed(0)
        model = hyper.build(trial(**{**values, "activation_gate": gated}))
        model.fit(x * 1e3, y, batch_size=64, epochs=1, verbose=0)
        grads.append(keras.ops.convert_to_numpy(model.get_layer("first").kernel))
    assert np.isfinite(grads).all()
    assert not np.allclose(*grads)


def test_mixed_precision_keeps_its_loss_scale():
    keras.config.set_dtype_policy("mixed_float16")
    hyper = ClipHyperModel(build_model)
    hp = trial(**{"clipper": "absolute", "absolute/threshold": 0.01})
    model = hyper.build(hp)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert model.optimizer.inner_optimizer.clipper == kgc.AbsoluteClip(0.01)
    x, y = data()
    history = hyper.fit(hp, model, x, y, epochs=2, verbose=0)
    assert math.isfinite(history.history["loss"][-1])


@keras.saving.register_keras_serializable("tests")
class CompiledByAlpha(keras.Model):
    """Compiles with an argument of its own, and saves it."""

    def compile(self, optimizer, alpha, **kwargs):
        super().compile(optimizer=optimizer, **kwargs)
        self.alpha = alpha

    def get_compile_config(self):
        return {**super().get_compile_config(), "alpha": self.alpha}

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)


@keras.saving.register_keras_serializable("tests")
def off_by(y_true, y_pred):
    return keras.ops.mean(keras.ops.abs(y_true - keras.ops.cast(y_pred, y_true.dtype)))


def scaled(optimizer):
    return keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=64.0)


def accumulating():
    return kgc.ClippedOptimizer("adam", None, gradient_accumulation_steps=2, skip_spikes=9)


@pytest.mark.parametrize(
    ("model_class", "optimizer", "policy", "extra"),
    [
        pytest.param(keras.Model, "adam", "float32", {}, marks=pytest.mark.slow),
        (keras.Model, lambda: keras.optimizers.Adam(0.01), "mixed_float16", {}),
        (keras.Model, lambda: scaled(keras.optimizers.Adam(0.01)), "float32", {}),
        pytest.param(
            *(keras.Model, accumulating, "float32", {"run_eagerly": True}), marks=pytest.mark.slow
        ),
        (keras.Model, lambda: scaled(accumulating()), "float32", {"steps_per_execution": 2}),
        (CompiledByAlpha, lambda: keras.optimizers.Adam(0.01), "float32", {"alpha": 3.0}),
        pytest.param(kgc.ClippedModel, "adam", "float32", {}, marks=pytest.mark.slow),
        (kgc.ClippedModel, "adam", "mixed_float16", {"skip_spikes": 9}),
        pytest.param(
            *(kgc.ClippedModel, accumulating, "float32", {"loss_weights": [2.0]}),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_model_of_a_trial_saves_and_goes_on_as_it_is(
    model_class, optimizer, policy, extra, tmp_path
):
    """What it was compiled with stays, clipper and optimizer state are saved."""
    keras.config.set_dtype_policy(policy)
    seen = {}

    def build(hp):
        model = build_model(hp, model_class, compiled=False)
        given = optimizer if isinstance(optimizer, str) else optimizer()
        model.compile(optimizer=given, loss="mse", weighted_metrics=[off_by], **extra)
        seen["config"], seen["optimizer"] = model.get_compile_config(), model.optimizer
        return model

    gated = model_class is kgc.ClippedModel
    values = {"clipper": "absolute", "absolute/threshold": 1e-3}
    gate = {"activation_gate": True, "gate/clip_value": 1e-6, "gate/gamma": 0.5}
    hyper = ClipHyperModel(build, activation_gate=gated)
    hp = trial(**values, **(gate if gated else {}))
    model = hyper.build(hp)
    x, y = data()
    hyper.fit(hp, model, x, y, batch_size=16, verbose=0)

    kept = {k: v for k, v in model.get_compile_config().items() if k != "optimizer"}
    before = (
        {**seen["config"], "activation_gate": kept["activation_gate"]} if gated else seen["config"]
    )
    assert kept == {k: v for k, v in before.items() if k != "optimizer"}
    clipped, given = find(model.optimizer), find(seen["optimizer"])
    if given is not None:
        names = ("gradient_accumulation_steps", "skip_spikes", "skip_nonfinite")
        assert [getattr(clipped, n) for n in names] == [getattr(given, n) for n in names]
    if isinstance(seen["optimizer"], keras.optimizers.LossScaleOptimizer):
        assert model.optimizer.initial_scale == seen["optimizer"].initial_scale

    model.save(tmp_path / "best.keras")
    loaded = keras.models.load_model(tmp_path / "best.keras")
    assert find(loaded.optimizer).clipper == clipped.clipper == kgc.AbsoluteClip(1e-3)
    assert getattr(loaded, "alpha", None) == extra.get("alpha")
    histories = [
        m.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0).history
        for m in (model, loaded)
    ]
    assert histories[0] == histories[1]
    assert not gated or histories[0]["clip_fraction"][0] > 0  # of the optimizer that trains
    assert int(loaded.optimizer.iterations) == int(model.optimizer.iterations) > 4
    for mine, its in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, its)


def test_what_no_config_holds_stays():
    """The optimizer that `build_model` made is used, not a copy of its config."""

    class Own(keras.optimizers.AdamW):
        pass

    def build(hp):
        model = build_model(hp, compiled=False)
        optimizer = Own(0.0, weight_decay=0.1)
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        model.compile(optimizer, "mse", metrics=[lambda y_true, y_pred: y_pred])
        return model

    hp = trial(clipper="norm", **{"norm/max_norm": 1.0})
    hyper = ClipHyperModel(build, objective="val_loss")
    model = hyper.build(hp)
    x, y = data()
    hyper.fit(hp, model, x, y, verbose=0)
    inner = model.optimizer.inner_optimizer
    assert type(inner) is Own
    decayed = [v.name for v in model.trainable_variables if inner._use_weight_decay(v)]
    assert decayed == ["kernel", "kernel"]


class OwnFit(kt.HyperModel):
    """As KerasTuner's guide writes it: the batch size is searched in `fit`."""

    def __init__(self, result=lambda history: history, rate=0.1):
        super().__init__()
        self.result, self.rate = result, rate

    def build(self, hp):
        return build_model(hp, optimizer=keras.optimizers.SGD(self.rate))

    def fit(self, hp, model, *args, **kwargs):
        size = hp.Choice("batch_size", [16, 32])
        return self.result(model.fit(*args, batch_size=size, **kwargs))


RESULTS = {
    "history": lambda history: history,
    "number": lambda history: history.history["val_accuracy"][-1],
    "figures": lambda history: {"val_accuracy": history.history["val_accuracy"][-1]},
    "several": lambda history: [history, history.history["val_accuracy"][-1]],
}


def test_a_hypermodel_of_its_own_is_searched_with_its_fit(tmp_path):
    hyper = ClipHyperModel(OwnFit(RESULTS["several"]), clippers=("norm",))
    tuner = kt.RandomSearch(
        hyper, objective="val_accuracy", max_trials=2, directory=tmp_path, seed=1
    )
    x, y = data()
    tuner.search(x, y, validation_split=0.5, epochs=1, verbose=0)
    for found in tuner.oracle.get_best_trials(2):
        values = found.hyperparameters.values
        assert values["batch_size"] in (16, 32) and values["norm/max_norm"] > 0
        assert 0 <= found.score <= 1
    model = hyper.build(tuner.get_best_hyperparameters()[0])
    assert isinstance(model.optimizer.clipper, kgc.NormClip)


@pytest.mark.parametrize("kind", RESULTS)
def test_a_fit_of_its_own_that_diverges_ranks_last(kind):
    hyper = ClipHyperModel(OwnFit(RESULTS[kind], rate=1e38), clippers=("none",))
    hp = kt.HyperParameters()
    model = hyper.build(hp)
    x, y = data()
    result = hyper.fit(hp, model, x, y, validation_split=0.5, epochs=1, verbose=0)
    assert result == {"val_accuracy": -math.inf, "diverged": 1.0}


def test_a_model_that_is_compiled_anew_without_its_clipper_is_refused():
    """As a tuner does for its argument `optimizer`."""
    hyper, hp, (x, y) = ClipHyperModel(build_model), kt.HyperParameters(), data()
    model = hyper.build(hp)
    model.compile("sgd", model.loss)
    with pytest.raises(ValueError, match="compiled again after `build`"):
        hyper.fit(hp, model, x, y, verbose=0)


@pytest.mark.slow
@pytest.mark.parametrize("tuner", ["random", "hyperband"])
def test_the_stock_tuners_rank_a_diverged_trial_last(tuner, tmp_path):
    """At this learning rate val_accuracy alone would let the diverged trial win."""

    def build(hp):
        model = build_model(hp)
        model.optimizer.learning_rate = hp.Choice("rate", [1e38, 1e-3])
        return model

    options = {"objective": "val_accuracy", "directory": tmp_path, "seed": 1}
    model = ClipHyperModel(build, clippers=("none",))
    if tuner == "hyperband":
        search = kt.Hyperband(model, max_epochs=2, factor=2, **options)
    else:
        search = kt.RandomSearch(model, max_trials=4, **options)
    x, y = data()
    search.search(x, y, validation_split=0.5, epochs=2, verbose=0)
    trials = search.oracle.get_best_trials(99)
    assert len(trials) == len(search.oracle.trials) >= 4
    diverged = [trial.hyperparameters.values["rate"] == 1e38 for trial in trials]
    assert diverged == sorted(diverged) and any(diverged) and not all(diverged)
    assert all(trial.score == -math.inf for trial, d in zip(trials, diverged, strict=True) if d)


def test_diverged_value():
    hyper = ClipHyperModel(build_model, objective="val_loss", diverged_value=9.0)
    hp = trial(clipper="none")
    model = hyper.build(hp)
    x, y = data()
    x[0] = np.nan
    result = hyper.fit(hp, model, x, y, validation_data=(x, y), epochs=5, verbose=0)
    assert result == {"val_loss": 9.0, "diverged": 1.0}
    assert ClipHyperModel(build_model, objective="val_loss").diverged_value == math.inf


@pytest.mark.parametrize(
    "build, options, message",
    [
        (lambda hp: build_model(hp, compiled=False), {}, "must build a compiled model"),
        (
            lambda hp: build_model(hp, optimizer=kgc.ClippedOptimizer("sgd", "norm")),
            {},
            "has the clipper NormClip",
        ),
        (
            lambda hp: build_model(hp, optimizer=kgc.ClippedOptimizer("sgd", "auto")),
            {},
            "has the clipper auto",
        ),
        (
            lambda hp: build_model(hp, optimizer=keras.optimizers.SGD(0.1, clipvalue=1.0)),
            {},
            "clips by itself",
        ),
        (
            lambda hp: build_model(
                hp, optimizer=keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 9))
            ),
            {"learning_rate": (0.01, 0.1)},
            "learning rate is a schedule",
        ),
    ],
)
def test_models_that_cannot_be_wrapped_are_refused(build, options, message):
    with pytest.raises(ValueError, match=message):
        ClipHyperModel(build, **options).build(kt.HyperParameters())


@pytest.mark.parametrize(
    "build, options, message",
    [
        (build_model, {"clippers": ("none", "agc")}, "`clippers` must be some of"),
        (build_model, {"threshold": (1.0, 0.1)}, "range of 'absolute/threshold'"),
        (build_model, {"treshold": (0.1, 1.0)}, "did you mean 'threshold'"),
        (OwnFit, {}, "an instance of keras_tuner.HyperModel"),
        (keras.Sequential(), {}, "`build_model` must be a function of hp"),
        ("resnet", {}, "but is 'resnet'"),
    ],
)
def test_mistakes_are_found_before_anything_is_built(build, options, message):
    with pytest.raises(ValueError, match=message):
        ClipHyperModel(build, **options)


@pytest.mark.parametrize("name", ["clipper", "learning_rate", "norm/max_norm"])
def test_a_name_that_both_declare_is_an_error(name, tmp_path):
    """KerasTuner would take the two for one hyper-parameter."""

    def build(hp):
        hp.Float(name, 0.1, 1.0)
        return build_model(hp)

    hyper = ClipHyperModel(build, clippers=("none", "norm"), learning_rate=(0.01, 0.1))
    with pytest.raises(ValueError, match=f"declares '{name}', which this search declares"):
        kt.RandomSearch(hyper, "val_accuracy", 2, directory=tmp_path)
    if name == "learning_rate":
        kt.RandomSearch(ClipHyperModel(build), "val_accuracy", 2, directory=tmp_path)


def test_a_learning_rate_that_is_set_twice_is_warned_of():
    def build(hp):
        return build_model(hp, optimizer=keras.optimizers.SGD(hp.Float("lr", 0.1, 1.0)))

    hyper = ClipHyperModel(build, learning_rate=(0.01, 0.1))
    with pytest.warns(UserWarning, match="learning rate, 0.1, and so is 'lr'"):
        model = hyper.build(kt.HyperParameters())
    assert float(model.optimizer.learning_rate) == pytest.approx(10**-1.5)


def test_a_conditional_hyperparameter_that_is_not_in_use():
    def build(hp):
        hp.Choice("optimizer", ["sgd", "adam"])
        with hp.conditional_scope("optimizer", ["adam"]):
            hp.Float("beta_1", 0.5, 0.9)
        return build_model(hp)

    hp = kt.HyperParameters()
    model = ClipHyperModel(build, learning_rate=(0.01, 0.1)).build(hp)
    assert "beta_1" not in hp.values
    assert float(model.optimizer.learning_rate) == pytest.approx(10**-1.5)


@pytest.mark.slow
def test_an_application_of_kerastuner_is_searched(tmp_path):
    """Its `build` compiles inside, and declares `learning_rate`."""

    def small():
        hp = kt.HyperParameters()
        for name, value in (("sep", 4), ("conv2d", 4)):
            hp.Fixed(f"{name}_num_filters", value)
        hp.Fixed("num_residual_blocks", 2)
        return hp

    xception = kt.applications.HyperXception(input_shape=(16, 16, 3), classes=2)
    tuner = kt.RandomSearch(
        ClipHyperModel(xception, clippers=("none", "norm")),
        *("val_accuracy", 1),
        hyperparameters=small(),
        directory=tmp_path,
        seed=1,
    )
    x = np.random.default_rng(0).normal(size=(8, 16, 16, 3)).astype("float32")
    y = np.eye(2, dtype="float32")[np.arange(8) % 2]
    tuner.search(x, y, validation_data=(x, y), epochs=1, verbose=0)
    values = tuner.get_best_hyperparameters()[0].values
    assert {"clipper", "learning_rate", "dropout_rate"} <= set(values)
    with pytest.raises(ValueError, match="leave `learning_rate=` out"):
        ClipHyperModel(xception, learning_rate=(0.1, 1.0)).build(small())


def test_a_missing_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "keras_gradclip.tuning.optuna_space", raising=False)
    with pytest.raises(ImportError, match=r"needs optuna: pip install optuna\."):
        tuning.suggest  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'suggestion'"):
        tuning.suggestion  # noqa: B018
    for name in set(tuning.__all__) - {"suggest"}:
        assert callable(getattr(tuning, name))


def test_objectives():
    assert as_objective("val_loss").direction == "min"
    assert as_objective("val_accuracy").direction == "max"
    assert as_objective("grad_norm", "min").name == "grad_norm"
    with pytest.raises(ValueError, match="'steering' should be large or small"):
        as_objective("steering")
    with pytest.raises(ValueError, match="metric's name"):
        as_objective(["val_loss", "loss"])
    with pytest.raises(ValueError, match="`direction` must be one of 'max', 'min'"):
        as_objective("val_loss", "down")


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    shorter = block.replace("max_trials=4", "max_trials=2").replace("epochs=3", "epochs=1")
    assert "max_trials=2" in shorter and "epochs=1" in shorter
    exec(compile(shorter, str(README), "exec"), {"__name__": "example"})
    assert "->" in capsys.readouterr().out.splitlines()[-1]
    first = (tmp_path / "runs/mine/clipping/trial_0000/trial.json").read_text()
    assert '"clipper": "none"' in first
