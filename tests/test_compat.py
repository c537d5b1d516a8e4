"""The private names of `_compat`: a Keras release that changes one fails with a clear message."""

import inspect
import re

import keras
import numpy as np
import pytest

import keras_gradclip as kgc
from keras_gradclip import _compat

tf = pytest.importorskip("tensorflow")


def test_functional_is_what_keras_model_returns():
    inputs = keras.Input((2,))
    model = keras.Model(inputs, keras.layers.ReLU()(inputs))
    assert type(model) is _compat.Functional, (
        "keras.Model(inputs, outputs) no longer returns keras.src.models.functional.Functional"
    )
    assert _compat.functional_init_arguments((inputs, model.outputs), {})
    assert not _compat.functional_init_arguments((), {"name": "model"})


def test_a_layer_has_its_own_variables_and_layers_and_is_found():
    inner = keras.layers.Dense(2)
    outer = keras.layers.TimeDistributed(inner)
    outer.build((None, 3, 4))
    inner.kernel.trainable = False
    assert [v.name for v in _compat.own_variables(inner)] == ["kernel", "bias"], (
        "Layer._trainable_variables and _non_trainable_variables no longer hold a layer's own"
    )
    assert _compat.own_variables(outer) == []
    assert [layer is inner for layer in _compat.own_layers(outer)] == [True], (
        "Layer._layers is gone"
    )
    living = {id(layer) for layer in _compat.living_layers()}
    assert {id(inner), id(outer)} <= living


def test_the_reduction_method_is_still_there_and_still_used():
    sgd = keras.optimizers.SGD(0.1)
    assert hasattr(sgd, "_all_reduce_sum_gradients"), (
        "TFOptimizer._all_reduce_sum_gradients is gone: find where Keras reduces gradients now, or "
        "every gradient will be summed over the replicas twice"
    )
    called = []
    sgd._all_reduce_sum_gradients = lambda pairs: called.append(1) or list(pairs)
    sgd.apply([tf.ones(1)], [keras.Variable(np.zeros(1, "float32"))])
    assert called, "Keras no longer calls _all_reduce_sum_gradients in apply"


def test_a_model_saves_the_optimizer_that_replaced_its_own():
    inputs = keras.Input((2,))
    model = keras.Model(inputs, keras.layers.Dense(1)(inputs))
    model.compile("adam", "mse")
    _compat.replace_optimizer(model, keras.optimizers.SGD(0.5))
    saved = keras.saving.deserialize_keras_object(model.get_compile_config())
    assert type(saved["optimizer"]) is keras.optimizers.SGD and saved["loss"] == "mse", (
        "Model._compile_config no longer holds what get_compile_config saves"
    )


def test_what_nadam_remembers_is_saved_under_a_loss_scale():
    ours = kgc.ClippedOptimizer(keras.optimizers.Nadam(0.1), "absolute")
    variable = keras.Variable(np.ones(1, "float32"))
    keras.optimizers.LossScaleOptimizer(ours).build([variable])
    alone = keras.optimizers.Nadam(0.1)
    alone.build([keras.Variable(np.ones(1, "float32"))])
    assert len(ours.inner_optimizer.variables) == len(alone.variables)
    assert any(v is ours.inner_optimizer._u_product for v in ours.inner_optimizer.variables), (
        "Optimizer._track_variable no longer puts a variable into `variables`: what Nadam "
        "remembers is not saved under mixed_float16"
    )


def test_an_optimizer_still_learns_who_scales_its_loss():
    ours = kgc.ClippedOptimizer(keras.optimizers.SGD(0.1), "absolute")
    outer = keras.optimizers.LossScaleOptimizer(ours)
    assert "apply" in outer.__dict__, (
        "LossScaleOptimizer.__init__ no longer assigns inner_optimizer.loss_scale_factor after "
        "inner_optimizer: mixed_float16 would fall back to skipping without a lower loss scale"
    )
    assert not ours._is_scaled_elsewhere


def test_the_loss_scale_has_the_variables_that_we_write():
    outer = keras.optimizers.LossScaleOptimizer(
        kgc.ClippedOptimizer(keras.optimizers.SGD(0.1), "absolute")
    )
    outer.build([keras.Variable(np.zeros(1, "float32"))])
    for name in ("dynamic_scale", "step_counter", "dynamic_growth_steps"):
        assert hasattr(outer, name), f"LossScaleOptimizer.{name} is gone"


def test_every_layer_is_found():
    class Custom(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.inner = keras.layers.Dense(1, name="inside")

        def call(self, x):
            return self.inner(x)

    model = keras.Sequential(
        [keras.Input((2,)), Custom(), keras.Sequential([keras.layers.ReLU(name="deep")])]
    )
    names = [layer.name for layer in _compat.all_layers(model)]
    assert "inside" in names and "deep" in names, "Layer._flatten_layers changed"


def test_averages_have_the_order_of_the_variables():
    method = keras.optimizers.SGD._overwrite_model_variables_with_average_value
    assert list(inspect.signature(method).parameters) == ["self", "trainable_variables"]
    sgd = keras.optimizers.SGD(0.1, use_ema=True)
    other, weight = keras.Variable([0.0]), keras.Variable([1.0])
    sgd.build([other, weight])
    average = sgd._model_variables_moving_average[1]
    [(target, source)] = _compat.moving_averages(sgd, [weight])
    assert target is weight and source is average
    assert _compat.knows(sgd, weight) and not _compat.knows(sgd, keras.Variable([1.0]))


def test_the_symbolic_build_is_where_we_replace_it():
    method = keras.Model._maybe_symbolic_build
    assert list(inspect.signature(method).parameters) == ["self", "iterator", "data_batch"], (
        "Model._maybe_symbolic_build changed: fit under MultiWorkerMirroredStrategy builds the "
        "model there, from a reduced batch (keras#20585)"
    )
    source = inspect.getsource(keras.Model.fit)
    assert "_maybe_symbolic_build(iterator=" in source, "fit no longer calls it"


@pytest.mark.parametrize("part", ["_compile_loss", "_compile_metrics"])
def test_a_loss_and_metrics_are_still_built_by_a_method_of_their_own(part):
    model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae"])
    assert hasattr(getattr(model, part, None), "build"), (
        f"Model.{part}.build is gone: find where Keras makes what it counts in, or a first step "
        "will be traced twice"
    )
    built = getattr(model, part)
    build, called = built.build, []
    built.build = lambda *arguments: called.append(part) or build(*arguments)
    model.train_on_batch(np.ones((2, 2)), np.ones((2, 1)))
    assert called, f"Keras no longer calls Model.{part}.build"


def test_private_names_live_in_one_module():
    """`keras.src` and TensorFlow's internals appear in _compat and aggregation alone."""
    from pathlib import Path

    package = Path(kgc.__file__).parent
    for path in package.rglob("*.py"):
        text = path.read_text()
        if path.name != "_compat.py":
            assert "keras.src" not in text, path.name
        if path.name not in ("_compat.py", "aggregation.py"):
            assert "__internal__" not in text, path.name
            assert "tf.distribute" not in re.sub(r"[`\"]tf\.distribute[^`\"]*[`\"]", "", text), (
                path.name
            )


def test_a_graph_for_xla_is_still_marked():
    seen = {}

    def note(name):
        seen[name] = _compat.is_traced_for_xla()
        return tf.zeros(())

    note("eager")
    tf.function(lambda: note("graph"))()
    tf.function(lambda: note("xla"), jit_compile=True)()
    tf.function(
        lambda: tf.cond(tf.ones(()) > 0, lambda: note("branch"), lambda: tf.zeros(())),
        jit_compile=True,
    )()
    assert seen == {"eager": False, "graph": False, "xla": True, "branch": True}, (
        "control_flow_util.GraphOrParentsInXlaContext no longer tells jit_compile=True apart: "
        "ClipByValue would hide a NaN in a compiled step"
    )


@pytest.mark.parametrize("name", ["_distributed_tf_update_step", "_apply_weight_decay"])
def test_keras_still_updates_a_list_of_variables_by_these_names(name):
    optimizer = keras.optimizers.AdamW(0.1)
    assert _compat.updates_are_replaceable(optimizer)
    called = []
    setattr(optimizer, name, lambda *_: called.append(1))
    optimizer.apply([tf.ones(1)], [keras.Variable(np.zeros(1, "float32"))])
    assert called, f"Keras no longer calls {name} in apply: compiled='auto' would do nothing"


def test_keras_still_updates_between_decay_and_averages():
    optimizer = keras.optimizers.AdamW(0.1, weight_decay=5.0, use_ema=True)
    weight = keras.Variable(np.ones(1, "float32"))
    seen = []

    def update(default, gradients, variables, learning_rate):
        seen.append(float(variables[0].numpy()[0]))
        default(gradients, variables, learning_rate)
        variables[0].assign([7.0])

    with _compat.changed(optimizer, {_compat.UPDATE: update}):
        optimizer.apply([tf.ones(1)], [weight])
    assert seen == [0.5], "Keras no longer calls _backend_update_step after decoupled weight decay"
    average = float(optimizer._model_variables_moving_average[0].numpy()[0])
    assert average == 7.0, "Keras no longer takes its moving averages after _backend_update_step"


def test_nadam_alone_counts_its_updates():
    """Its updates must not be done in two parts."""
    assert _compat.updates_are_separable(keras.optimizers.Adam())
    assert not _compat.updates_are_separable(keras.optimizers.Nadam())


def test_muon_still_says_what_it_leaves_to_adamw():
    kernel, bias = keras.Variable(np.ones((3, 2))), keras.Variable(np.ones(2))
    muon = keras.optimizers.Muon()
    muon.build([kernel, bias])
    assert not _compat.muon_uses_adamw(muon, kernel)
    assert _compat.muon_uses_adamw(muon, bias)


def test_the_global_generators_are_where_they_were():
    keras.utils.set_random_seed(1)
    assert _compat.get_global_seed_generator() is None
    first = keras.random.normal((2,)).numpy()
    assert isinstance(_compat.get_global_seed_generator(), keras.random.SeedGenerator), (
        "Keras keeps the generator of unseeded draws elsewhere now: calibrate would change it"
    )
    _compat.set_global_seed_generator(None)  # Keras 3.12 keeps it
    keras.utils.set_random_seed(1)
    with _compat.tensorflow_random_state():
        operation = tf.random.normal((2,)).numpy()
    np.testing.assert_array_equal(tf.random.normal((2,)).numpy(), operation)
    np.testing.assert_array_equal(keras.random.normal((2,)).numpy(), first)
