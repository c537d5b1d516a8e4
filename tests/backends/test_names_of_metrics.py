"""A user's metric with the name of one of the two figures keeps it."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradclip as kgc

BACKEND = keras.backend.backend()
FIGURES = ("grad_norm", "clip_fraction")
X = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
Y = 9 * X[:, :1]
MINE = 41.0
not_jax = pytest.mark.skipif(BACKEND == "jax", reason="a train step on JAX is written otherwise")


class Constant(keras.metrics.Metric):
    """A metric with a constant result."""

    def update_state(self, *args, **kwargs):
        pass

    def result(self):
        return ops.convert_to_tensor(MINE)


class Several(Constant):
    """A metric with several results."""

    def __init__(self, inner):
        super().__init__(name="several")
        self.inner = inner

    def result(self):
        return {self.inner: ops.convert_to_tensor(MINE), "other": ops.convert_to_tensor(1.0)}


def network(name="out"):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    return inputs, layers.Dense(1, name=name)(inputs)


def compiled_in_a_list(name):
    model = kgc.ClippedModel(*network())
    return model, {"metrics": [Constant(name=name), "mae"]}


def compiled_in_a_dict(name):
    inputs, out = network()
    model = kgc.ClippedModel(inputs, {"out": out, "second": layers.Dense(1, name="second")(inputs)})
    # Keras calls it by its output, too: `grad_norm` of `norm` at the output `grad`.
    return model, {
        "metrics": {"out": [Constant(name=name)]},
        "loss": {"out": "mse", "second": "mse"},
    }


def compiled_for_an_output(name):
    output, _, tail = name.partition("_")
    inputs, out = network(output)
    model = kgc.ClippedModel(
        inputs, {output: out, "second": layers.Dense(1, name="second")(inputs)}
    )
    metrics = {output: [Constant(name=tail)]}
    return model, {"metrics": metrics, "loss": {output: "mse", "second": "mse"}}


def weighted(name):
    model = kgc.ClippedModel(*network())
    return model, {"weighted_metrics": [Constant(name=name)]}


def tracked_by_the_model(name):
    class Mine(kgc.ClippedModel):
        def __init__(self, inputs, outputs):
            super().__init__(inputs, outputs)
            self.mine = Constant(name=name)

    return Mine(*network()), {}


def tracked_by_a_layer(name):
    class Watching(layers.Dense):
        def __init__(self):
            super().__init__(1)
            self.mine = Constant(name=name)

    inputs = keras.Input((4,))
    return kgc.ClippedModel(inputs, Watching()(inputs)), {}


def with_several_results(name):
    class Mine(kgc.ClippedModel):
        def __init__(self, inputs, outputs):
            super().__init__(inputs, outputs)
            self.mine = Several(name)

    return Mine(*network()), {}


WAYS = [
    *(compiled_in_a_list, compiled_for_an_output, weighted, tracked_by_the_model),
    *(tracked_by_a_layer, with_several_results),
]


# Each way with one of the names, in turn.
@pytest.mark.parametrize(("way", "name"), [*zip(WAYS, 3 * FIGURES, strict=True)])
def test_the_users_metric_keeps_its_name(way, name):
    model, arguments = way(name)
    loss = arguments.pop("loss", "mse")
    model.compile("sgd", loss, clipper=kgc.NormClip(0.5), **arguments)
    y = {key: Y for key in loss} if isinstance(loss, dict) else Y
    fit = {"batch_size": 8, "verbose": 0, "validation_data": (X, y), "epochs": 2}
    with pytest.warns(UserWarning, match=f"a metric of yours is called '{name}'"):
        history = model.fit(X, y, **fit).history
    assert history[name] == [MINE] * 2 and history[f"val_{name}"] == [MINE] * 2
    (other,) = {*FIGURES} - {name}
    assert np.isfinite(history[other]).all() and f"val_{other}" not in history
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert model.fit(X, y, **fit).history[name] == [MINE] * 2
        assert model.evaluate(X, y, verbose=0, return_dict=True)[name] == MINE
    # The figure itself begins anew in each epoch, left out or not.
    assert model.optimizer.read_telemetry()["updates"] == 4


def test_a_name_at_an_output_is_another_name():
    model, arguments = compiled_in_a_dict("grad_norm")
    model.compile("sgd", clipper=kgc.NormClip(0.5), **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = model.fit(X, {"out": Y, "second": Y}, batch_size=8, verbose=0).history
    assert history["out_grad_norm"] == [MINE] and history["grad_norm"] != [MINE]


@not_jax
def test_names_in_a_train_step_of_ones_own():
    class Mine(kgc.ClippedModel):
        def __init__(self, inputs, outputs):
            super().__init__(inputs, outputs)
            self.mine = Constant(name="grad_norm")

        def train_step(self, data):
            super().train_step(data)
            return {m.name: m.result() for m in self.metrics if m.name != "compile_metrics"}

    model = Mine(*network())
    model.compile("sgd", "mse", clipper=kgc.NormClip(0.5))
    with pytest.warns(UserWarning, match="a metric of yours"):
        history = model.fit(X, Y, batch_size=8, verbose=0).history
    assert history["grad_norm"] == [MINE] and 0 <= history["clip_fraction"][0] <= 1
