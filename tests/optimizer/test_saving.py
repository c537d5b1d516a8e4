"""Interrupted equals never interrupted, bit for bit on one device."""

import pickle
import warnings

import keras
import numpy as np
import pytest
from helpers import data, loss, net, strategy, weights

import keras_gradclip as kgc
from keras_gradclip.optimizer import _saving
from keras_gradclip.optimizer.clipped_optimizer import find

tf = pytest.importorskip("tensorflow")


def compiled(policy="float32", accumulate=None, model_class=None):
    keras.config.set_dtype_policy(policy)
    model = net(model_class)
    schedule = keras.optimizers.schedules.CosineDecay(1e-2, 100, warmup_target=2e-2, warmup_steps=5)
    inner = keras.optimizers.AdamW(schedule, use_ema=True)
    clipper = kgc.ClipMap({"head/.*": kgc.ExponentialClip(gamma=0.05)}, kgc.NormClip(0.1))
    model.compile(
        kgc.ClippedOptimizer(inner, clipper, gradient_accumulation_steps=accumulate),
        loss(),
        loss_weights=30.0,
    )
    return model


CASES = [
    ("float32", 3, None),
    ("mixed_float16", None, None),
    ("float32", None, keras.Model),
]


def fit(model):
    x, y = data(40)
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)


@pytest.mark.parametrize("policy, accumulate, model_class", CASES)
def test_keras_file(policy, accumulate, model_class, tmp_path):
    """5 steps, saved, 5 more; the accumulation of 3 is interrupted in the middle."""
    model = compiled(policy, accumulate, model_class)
    fit(model)
    find(model.optimizer).clip_hyperparameters["default/max_norm"] = 0.07
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert type(loaded) is type(model)
    assert find(loaded.optimizer).clip_hyperparameters["default/max_norm"] == pytest.approx(0.07)
    fit(model)
    fit(loaded)
    np.testing.assert_array_equal(weights(model), weights(loaded))
    for a, b in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


@pytest.mark.parametrize("policy, accumulate, model_class", CASES[:2])
def test_checkpoint(policy, accumulate, model_class, tmp_path):
    model = compiled(policy, accumulate, model_class)
    fit(model)
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(str(tmp_path / "c"))
    fit(model)
    other = compiled(policy, accumulate, model_class)
    other.optimizer.build(other.trainable_variables)
    status = tf.train.Checkpoint(model=other, optimizer=other.optimizer).restore(path)
    status.assert_existing_objects_matched()
    fit(other)
    np.testing.assert_array_equal(weights(model), weights(other))


def test_weights_file_keeps_the_optimizer(tmp_path):
    model = compiled()
    fit(model)
    model.save_weights(tmp_path / "m.weights.h5")
    other = compiled()
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "m.weights.h5")
    for m in (model, other):
        fit(m)
    np.testing.assert_array_equal(weights(model), weights(other))


def test_weights_alone_go_into_an_optimizer_that_is_not_built(tmp_path):
    model = compiled(accumulate=3)
    fit(model)
    model.save_weights(tmp_path / "m.weights.h5")
    other = compiled(accumulate=3)
    with pytest.warns(UserWarning, match="Build it first"):
        other.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(weights(model), weights(other))


STATES = [
    lambda: kgc.ClippedOptimizer("sgd", "absolute"),
    lambda: kgc.ClippedOptimizer("sgd", "auto"),
    lambda: kgc.ClippedOptimizer("sgd", "percentile", skip_spikes=6),
    lambda: kgc.ClippedOptimizer("sgd", "zscore", gradient_accumulation_steps=2),
]


def warnings_of(caught):
    return [str(w.message) for w in caught if "ClippedOptimizer" in str(w.message)]


@pytest.mark.parametrize(
    ("make", "model_class"), [*zip(STATES, 2 * [keras.Model, kgc.ClippedModel], strict=True)]
)
def test_what_was_not_trained_is_loaded_without_a_warning(make, model_class, tmp_path):
    model = net(model_class)
    model.compile(make(), loss())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save(tmp_path / "m.keras")
        loaded = keras.models.load_model(tmp_path / "m.keras")
        model.save_weights(tmp_path / "m.weights.h5")
        loaded.load_weights(tmp_path / "m.weights.h5")
        pickle.loads(pickle.dumps(model))
    assert warnings_of(caught) == []
    fit(loaded)


@pytest.mark.parametrize("make, warns", [*zip(STATES, (False, False, True, True), strict=True)])
def test_weights_into_a_new_model_warn_of_lost_state_alone(make, warns, tmp_path):
    """As each round of a search does, whose models were not trained yet."""
    model, other = net(), net()
    model.compile(make(), loss())
    fit(model)
    model.save_weights(tmp_path / "m.weights.h5")
    other.compile(make(), loss())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other.load_weights(tmp_path / "m.weights.h5")
    assert bool(warnings_of(caught)) == warns


def test_another_threshold_is_told_also_of_what_was_not_trained():
    store = {}
    kgc.ClippedOptimizer("sgd", kgc.AbsoluteClip(0.1)).save_own_variables(store)
    other = kgc.ClippedOptimizer("sgd", kgc.NormClip(0.1))
    other.build([keras.Variable([1.0])])
    with pytest.warns(UserWarning, match="hyper:threshold"):
        other.load_own_variables(store)


@keras.saving.register_keras_serializable("test_saving")
class OwnClass(keras.Model):
    """Its layers' paths differ once it is loaded: own_class/dense_1/kernel, dense/kernel."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table, self.a, self.b = (
            keras.layers.Embedding(9, 4),
            keras.layers.Dense(4, activation="tanh"),
            keras.layers.Dense(3),
        )

    def call(self, x):
        return self.b(self.a(keras.ops.mean(self.table(x), axis=1)))


def by_path(model):
    guard = kgc.PercentileClip(50.0, window=4, scope="layer")
    first, second = (v.path for v in (model.a.kernel, model.b.kernel))
    return kgc.ClipMap({first: guard, second: None, ".*bias": kgc.AbsoluteClip(1e-3)})


@pytest.mark.parametrize(
    "clipper",
    [
        by_path,
        lambda model: "auto",
        pytest.param(
            lambda model: kgc.ClipMap({".*/dense_1/.*": kgc.AbsoluteClip(1e-4)}),
            marks=pytest.mark.slow,
        ),
        lambda model: kgc.AdaptiveClip(1e-3, axes={model.a.kernel.path: (1,)}),
    ],
)
@pytest.mark.filterwarnings("error::UserWarning")
def test_a_loaded_subclassed_model_keeps_its_rules(clipper, tmp_path):
    x, y = np.arange(80).reshape(16, 5) % 9, np.arange(16) % 3
    keras.utils.clear_session()
    keras.layers.Dense(1)  # takes a name
    model = OwnClass()
    model(x)
    inner = keras.optimizers.Adam(0.1)
    scores = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(kgc.ClippedOptimizer(inner, clipper(model)), scores, run_eagerly=True)

    def train(model):
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
        return model.optimizer.variables

    train(model)
    model.save(tmp_path / "m.keras")
    keras.utils.clear_session()
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert [v.path for v in loaded.variables] != [v.path for v in model.variables]
    rules = [c.optimizer.clipper.rule_of(c.trainable_variables) for c in (model, loaded)]
    assert rules[0] == rules[1]
    for a, b in zip(train(model), train(loaded), strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    np.testing.assert_array_equal(weights(model), weights(loaded))

    loaded.save(tmp_path / "m.keras")  # once more; then rules for the paths that it has now
    again = keras.models.load_model(tmp_path / "m.keras")
    again.compile(kgc.ClippedOptimizer("sgd", by_path(again)), scores, run_eagerly=True)
    train(again)
    assert again.optimizer.clipper.rule_of([again.a.kernel])[0][0] == again.a.kernel.path


def test_an_optimizer_of_another_model_takes_no_paths_along():
    def named(*names):
        layers = [keras.layers.Dense(2, name=name) for name in names]
        return keras.Sequential([keras.Input((2,)), *layers])

    first = kgc.ClippedOptimizer("sgd", kgc.ClipMap({".*head/.*": None}, kgc.AbsoluteClip(0.1)))
    first.build(named("body", "head").trainable_variables)
    second = kgc.ClippedOptimizer.from_config(first.get_config())
    variables = named("head", "body").trainable_variables
    second.build(variables)
    rules = [name for name, _ in second.clipper.rule_of(variables)]
    assert rules == [".*head/.*", ".*head/.*", "default", "default"]


def test_saved_on_replicas_loaded_on_one_device(tmp_path):
    with strategy(2).scope():
        model = compiled(accumulate=3)
    fit(model)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    fit(model)
    fit(loaded)
    np.testing.assert_allclose(weights(model), weights(loaded), atol=2e-5)


def test_the_file_holds_the_inner_state_once(tmp_path):
    import zipfile

    import h5py

    model = compiled()
    fit(model)
    model.save(tmp_path / "m.keras")
    with zipfile.ZipFile(tmp_path / "m.keras") as archive:
        archive.extract("model.weights.h5", tmp_path)
    with h5py.File(tmp_path / "model.weights.h5") as file:
        own = len(file["optimizer/vars"])
        inner = len(file["optimizer/inner_optimizer/vars"])
    assert own == len(model.optimizer._saved()) == 5  # no slot of the inner optimizer among them
    assert inner == len(model.optimizer.inner_optimizer.variables)


def test_state_of_another_configuration_is_not_loaded():
    a, b = compiled(), compiled(accumulate=3)
    for model in (a, b):
        model.optimizer.build(model.trainable_variables)
    store = {}
    a.optimizer.save_own_variables(store)
    with pytest.warns(UserWarning, match=r"accumulator:0.*gradient_accumulation_steps"):
        b.optimizer.load_own_variables(store)


def test_a_threshold_never_becomes_another_clippers(tmp_path):
    """Equally many variables, another meaning."""
    x, y = data(8)
    model = net()
    model.compile("sgd", loss(), clipper=kgc.AbsoluteClip(0.003))
    model.fit(x, y, verbose=0)
    model.save_weights(tmp_path / "m.weights.h5")
    other = net()
    other.compile("sgd", loss(), clipper=kgc.NormClip(1.0))
    other.optimizer.build(other.trainable_variables)
    with pytest.warns(UserWarning, match=r"hyper:max_norm.*hyper:threshold"):
        other.load_weights(tmp_path / "m.weights.h5")
    assert other.clip_hyperparameters["max_norm"] == 1.0
    np.testing.assert_array_equal(weights(model), weights(other))


@pytest.mark.parametrize("clipper", ["norm", kgc.ClipMap({"stem/.*": kgc.NormClip(0.1)})], ids=str)
def test_saved_after_freezing_a_layer(clipper, tmp_path):
    x, y = data(8)
    model = net()
    model.compile("adam", loss(), clipper=clipper)
    model.fit(x, y, verbose=0)
    model.get_layer("stem").trainable = False
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(weights(model), weights(loaded))
    loaded.fit(x, y, verbose=0)


@keras.saving.register_keras_serializable("tests")
class OwnCompile(kgc.ClippedModel):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(1)

    def call(self, x):
        return self.dense(x)

    def compile(self, optimizer, temperature=1.0):
        super().compile(optimizer, "mse", clipper="absolute")


def test_a_model_with_a_compile_of_its_own_loads_as_in_keras(tmp_path):
    model = OwnCompile()
    model.compile("sgd")
    model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)
    model.save(tmp_path / "m.keras")
    with pytest.warns(UserWarning, match="`compile\\(\\)` method is custom"):
        loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(weights(model), weights(loaded))


def test_set_weights_covers_the_inner_optimizer():
    model, other = compiled(), compiled()
    fit(model)
    other.optimizer.build(other.trainable_variables)
    other.optimizer.set_weights([v.numpy() for v in model.optimizer.variables])
    other.set_weights(model.get_weights())
    for m in (model, other):
        fit(m)
    np.testing.assert_array_equal(weights(model), weights(other))
    with pytest.raises(ValueError, match="shapes"):
        other.optimizer.set_weights([np.zeros(1)])


def test_config_round_trip():
    optimizer = compiled().optimizer
    config = keras.optimizers.serialize(optimizer)
    again = keras.optimizers.deserialize(config)
    assert isinstance(again, kgc.ClippedOptimizer)
    assert keras.optimizers.serialize(again) == config
    assert again.clipper == optimizer.clipper


def test_clone_and_from_config_of_a_functional_model():
    model = net()
    clone = keras.models.clone_model(model)
    assert isinstance(clone, kgc.ClippedModel)
    again = type(model).from_config(model.get_config())
    assert isinstance(again, kgc.ClippedModel)


def test_backup_and_restore_callback(tmp_path):
    """Keras's own callback resumes a run that stopped after the first epoch."""
    x, y = data(16)

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    def run(callbacks, epochs=3):
        model = compiled()
        model.fit(x, y, epochs=epochs, batch_size=8, shuffle=False, verbose=0, callbacks=callbacks)
        return weights(model)

    backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
    with pytest.raises(KeyboardInterrupt):
        run([backup, Stop()])
    resumed = run([keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))])
    np.testing.assert_array_equal(resumed, run([]))


def test_every_worker_loads_in_the_same_order():
    """The assignment of a sum over replicas is a reduction; a set of names differs by process."""
    order, names = [], [f"accumulator:{i}" for i in range(20)]

    class Variable:
        shape = ()

        def assign(self, value):
            order.append(int(value))

    own = {name: Variable() for name in names}
    _saving.load(own, {name: np.array(i) for i, name in enumerate(names)}, True, False)
    assert order == [*range(20)]
