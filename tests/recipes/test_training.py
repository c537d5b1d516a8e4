"""Whole runs of a tiny recipe: what they write, how they fail, and what the options do."""

import dataclasses
import json
import math
import re
import time
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from matplotlib.figure import Figure
from tiny_recipe import RECIPE

from recipes.errors import RecipeError, TrainingDiverged
from recipes.training import build, checkpoint, main, plots, run
from recipes.training import callbacks as cb
from recipes.training import folder as folders
from recipes.training import options as opts
from recipes.words import counted

pytestmark = pytest.mark.usefixtures("blank_pictures")

QUICK = {"epochs": 1, "limit_steps": 2, "verbose": "quiet"}


def quick(tmp_path, **values):
    return run(RECIPE, RECIPE.options(**{**QUICK, **values}), tmp_path / "run")


# ------------------------------------------------------------------------------ a run that works


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    argv = ["--output", str(folder), "--epochs", "2", "--tensorboard"]
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *parts, **_: lines.append(" ".join(parts)))
        assert main(RECIPE, argv) == 0
    return folder, lines


def test_last_lines(finished):
    _, lines = finished
    assert re.fullmatch(r"Best accuracy: \d+\.\d\d%", lines[-2])
    assert re.fullmatch(r"Time taken: \d+ seconds", lines[-1])


def test_files(finished):
    folder, lines = finished
    history = folders.read_history(folder / folders.HISTORY)
    assert [row["epoch"] for row in history] == [1, 2]
    assert {"loss", "accuracy", "val_accuracy", "grad_norm", "clip_fraction"} <= set(history[0])
    layers = folders.read_history(folder / folders.LAYERS)
    assert [row["layer"] for row in layers] == ["conv1", "bn1", "conv2", "predictions"] * 2
    assert any(row["clip_fraction"] > 0 for row in layers)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard" / "train").glob("events*"))
    best = max(row["val_accuracy"] for row in history)
    assert lines[-2] == f"Best accuracy: {100 * best:.2f}%"
    assert json.loads((folder / "config.json").read_text())["epochs"] == 2


def test_the_learning_rate_of_an_epoch_is_that_of_its_last_update(finished):
    """At the end of the last one the cosine has come to 0, which no update had."""
    folder, _ = finished
    rates = [row["learning_rate"] for row in folders.read_history(folder / folders.HISTORY)]
    options = RECIPE.options(epochs=2)
    schedule = build.build_optimizer(options, keras.Sequential(), steps=8)._learning_rate
    assert rates == pytest.approx([float(schedule(7)), float(schedule(15))])
    assert rates[1] > 0


def test_the_seconds_of_a_run_end_with_its_test(tmp_path, monkeypatch):
    before = build.Setup.test

    def slow(self, path):
        time.sleep(1.5)
        return before(self, path)

    monkeypatch.setattr(build.Setup, "test", slow)
    started = time.monotonic()
    result = quick(tmp_path, select_best="improve")
    assert result.seconds == pytest.approx(time.monotonic() - started, abs=1)


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 epochs"), (1, "1 epoch"), (2, "2 epochs"), (1200, "1,200 epochs")]
)
def test_one_is_no_plural(number, text):
    assert counted(number, "epoch") == text


def test_best_model_loads_by_itself_and_scores_the_same(finished):
    folder, lines = finished
    model = keras.models.load_model(folder / folders.BEST)
    assert type(model).__module__.startswith("keras.")
    options = RECIPE.options()
    data = RECIPE.load_data(options)
    from recipes.data import Feed

    right = [
        np.argmax(model.predict_on_batch(x), axis=-1) == y.numpy()
        for x, y in Feed(data, 50).evaluation(data.validation)
    ]
    assert lines[-2] == f"Best accuracy: {100 * np.mean(right):.2f}%"


def test_best_model_needs_nothing_of_this_package_and_fine_tunes(finished):
    folder, _ = finished
    with zipfile.ZipFile(folder / folders.BEST) as file:
        config = file.read("config.json").decode()
    assert "recipes" not in config and "keras_gradclip" not in config
    images = np.zeros((4, 16, 16, 3), "float32")
    model = keras.models.load_model(folder / folders.BEST)
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(images, np.arange(4), verbose=0)


def test_a_finished_run_keeps_its_result_and_no_backup(finished, capsys):
    folder, lines = finished
    assert not (folder / folders.BACKUP).exists()
    result = json.loads((folder / folders.RESULT).read_text())
    assert lines[-2] == f"Best accuracy: {100 * result['best']:.2f}%"
    names = (folders.HISTORY, folders.CONFIG)
    before = [(folder / name).read_bytes() for name in names]
    argv = ["--resume", "--output", str(folder)]
    assert main(RECIPE, [*argv, "--epochs", "1"]) == 0  # fewer than it has: they stay
    assert json.loads((folder / folders.RESULT).read_text()) == result
    capsys.readouterr()
    assert main(RECIPE, argv) == 0
    printed = capsys.readouterr().out
    assert f"Best accuracy: {100 * result['best']:.2f}%" in printed
    assert "finished: all steps are done" in printed and "going on" not in printed
    assert main(RECIPE, [*argv, "--epochs", "3"]) == 2
    assert "ended after 2 epochs, and its backup is gone" in capsys.readouterr().err
    assert [(folder / name).read_bytes() for name in names] == before


def test_saved_config_runs_again_to_the_same_end(finished, tmp_path):
    folder, _ = finished
    again = tmp_path / "again"
    argv = ["--config", str(folder / "config.json"), "--output", str(again), "--verbose", "quiet"]
    assert main(RECIPE, argv) == 0
    assert folders.read_history(again / folders.HISTORY) == folders.read_history(
        folder / folders.HISTORY
    )


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_curves_of_an_infinite_norm(finished, tmp_path):
    folder, _ = finished
    history, layers = (folders.read_history(folder / n) for n in (folders.HISTORY, folders.LAYERS))
    layers[0]["grad_norm"] = math.inf
    plots.draw_curves(history, layers, tmp_path / "curves.png", "title", "accuracy")


def test_numbers_on_a_logarithmic_axis_are_plain():
    axis = Figure().subplots()
    axis.set_ylim(0.6, 0.95)
    plots._logarithmic(axis)
    labels = [label.get_text() for label in axis.get_yticklabels(minor=True)]
    assert "0.7" in labels and not any("e" in label for label in labels)


def test_folder_with_something_in_it_is_left_alone(finished, capsys):
    folder, _ = finished
    before = (folder / folders.BEST).read_bytes()
    assert main(RECIPE, ["--output", str(folder)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert (folder / folders.BEST).read_bytes() == before


def test_default_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        _, folder = folders.open_run(RECIPE, opts.parse(RECIPE, []))
        (folder / "config.json").write_text("{}")
        names.append(str(folder))
    assert names == ["runs/tiny", "runs/tiny-2", "runs/tiny-3"]
    _, folder = folders.open_run(RECIPE, opts.parse(RECIPE, ["--resume"]))
    assert str(folder) == "runs/tiny-3"


# ------------------------------------------------------------------------------- runs that fail


def fails(capsys, argv, status):
    assert main(RECIPE, argv) == status
    error = capsys.readouterr().err.strip()
    assert error.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in error
    return error


def test_impossible_threshold(capsys, tmp_path):
    folder = tmp_path / "run"
    error = fails(capsys, ["--threshold", "0", "--output", str(folder)], 2)
    assert "threshold" in error and "0" in error
    assert not folder.exists()


def test_batch_must_divide_by_devices(capsys, tmp_path):
    argv = ["--devices", "3", "--batch-size", "64", "--output", str(tmp_path / "run")]
    assert "--batch-size 64 is not divisible by --devices 3" in fails(capsys, argv, 2)


def test_a_run_without_an_update_is_refused(capsys, tmp_path):
    flags = ["--accumulate", "3", "--epochs", "1", "--limit-steps", "2"]
    assert main(RECIPE, [*flags, "--output", str(tmp_path / "run")]) == 2
    assert "--accumulate 3: the run has 2 steps, too few for one" in capsys.readouterr().err


def test_an_epoch_without_an_update_has_no_share_of_the_mean(tmp_path, capsys):
    result = quick(tmp_path, accumulate=3, epochs=2, verbose="line")
    first, second = (row["clip_fraction"] for row in result.history)
    assert math.isnan(first) and result.clip_fraction == second > 0
    assert "nan" not in capsys.readouterr().out


def test_jit_on_several_cpus(capsys, tmp_path):
    if tf.config.list_physical_devices("GPU"):
        pytest.skip("works there")
    argv = ["--devices", "2", "--jit", "--output", str(tmp_path / "run")]
    assert "--jit does not work on several CPU devices" in fails(capsys, argv, 2)


def test_too_many_devices(capsys, tmp_path):
    argv = ["--devices", "64", "--batch-size", "64", "--output", str(tmp_path / "run")]
    tf.config.list_logical_devices()  # TensorFlow has started: no more of them
    assert re.search(r"--devices 64: this machine has \d+ ", fails(capsys, argv, 2))


def test_missing_data_set(capsys, tmp_path):
    from recipes.resnet50 import RECIPE as resnet50

    argv = ["--dataset", "cifar1", "--output", str(tmp_path / "run")]
    assert main(resnet50, argv) == 2
    assert "did you mean cifar10" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def stop_in_epoch_2(monkeypatch, error):
    """Raises at the end of the second epoch, when the first one's files are there."""
    original = cb.EpochFiles.on_epoch_end

    def on_epoch_end(self, epoch, logs=None):
        if epoch == 1:
            raise error
        original(self, epoch, logs)

    monkeypatch.setattr(cb.EpochFiles, "on_epoch_end", on_epoch_end)


def test_ctrl_c_says_how_to_go_on(capsys, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    stop_in_epoch_2(monkeypatch, KeyboardInterrupt())
    error = fails(capsys, ["--output", str(folder), "--limit-steps", "2"], 130)
    assert f"--resume --output {folder}" in error
    assert keras.models.load_model(folder / folders.BEST)
    monkeypatch.undo()
    assert checkpoint.load_backup(folder / folders.BACKUP)["step"] == 2


def test_full_disk_leaves_the_last_good_model(capsys, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    run(RECIPE, RECIPE.options(**QUICK, keep_backup=True), folder)
    good = (folder / folders.BEST).read_bytes()

    def full(self, scratch, *args, **kwargs):
        with open(scratch, "wb") as file:
            file.write(b"half a mod")
        raise OSError(28, "No space left on device", scratch)

    monkeypatch.setattr(keras.Model, "save", full)
    monkeypatch.setattr(type(RECIPE), "kept_epoch", lambda recipe, rule, history: len(history) - 1)
    argv = ["--resume", "--epochs", "2", "--output", str(folder), "--verbose", "quiet"]
    assert "No space left on device" in fails(capsys, argv, 1)
    assert (folder / folders.BEST).read_bytes() == good
    assert not list(folder.glob(".partial*"))


def test_nan_names_the_layer_and_keeps_the_model(capsys, tmp_path):
    folder = tmp_path / "run"
    error = fails(capsys, ["--output", str(folder), "--poison", "forward"], 1)
    assert "epoch 1" in error
    assert "step 0, first non-finite gradient: 'conv1/kernel'" in error  # all are: the first
    assert (folder / folders.CONFIG).exists() and not (folder / folders.BACKUP).exists()


@pytest.mark.parametrize("precision", ["none", "float16"])
def test_nothing_but_skipped_updates_is_no_training(capsys, tmp_path, precision):
    argv = ["--output", str(tmp_path / "run"), "--poison", "forward", "--batch-size", "16"]
    argv += ["--skip-nonfinite"] if precision == "none" else ["--mixed-precision", precision]
    error = fails(capsys, [*argv, "--verbose", "quiet"], 1)
    assert "epoch 1" in error
    assert "first non-finite gradient: 'conv1/kernel'" in error


def test_damaged_example_is_one_line(capsys, tmp_path):
    def load_data(options):
        data = RECIPE.load_data(options)
        damaged = data.train.dataset.enumerate().map(
            lambda i, e: (tf.where(i == 3, tf.constant(b"\xff\xd8\xffjunk"), e[0]), e[1])
        )
        return dataclasses.replace(data, train=dataclasses.replace(data.train, dataset=damaged))

    recipe = dataclasses.replace(RECIPE, load_data=load_data)
    assert main(recipe, ["--output", str(tmp_path / "run"), "--verbose", "quiet"]) == 1
    assert "error: jpeg::Uncompress failed" in capsys.readouterr().err


def test_nan_in_a_later_epoch_keeps_the_best_model(tmp_path):
    class Spoil(keras.callbacks.Callback):
        """Sets a weight so large, before step 11, that step 11 overflows."""

        step = 0

        def on_train_batch_begin(self, batch, logs=None):
            if self.step == 11:
                layer = self.model.get_layer("conv2")
                layer.bias.assign(np.full(layer.bias.shape, 3e38, "float32"))
            self.step += 1

    options = RECIPE.options(epochs=2, verbose="quiet")
    with pytest.raises(TrainingDiverged) as error:
        run(RECIPE, options, tmp_path / "run", callbacks=[Spoil()])
    assert error.value.step == 11
    assert error.value.layer == "conv1"
    assert "in epoch 2: step 11, " in str(error.value)
    assert keras.models.load_model(tmp_path / "run" / folders.BEST)  # of epoch 1


def test_plain_sgd_warns():
    [line] = build.warnings(RECIPE.options(optimizer="sgd"))
    assert line.startswith("plain SGD")
    assert not build.warnings(RECIPE.options(optimizer="sgd", momentum=0.9))


# ----------------------------------------------------------------------------- what options do


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"clipper": "none"}, marks=pytest.mark.slow),
        {
            **{"clipper": "exponential", "beta": 0.5, "rescale": "alpha"},
            **{"activation_gate": True, "gate_gamma": 0.5},
        },
        pytest.param(
            {"clipper": "norm", "max_norm": 0.1, "scope": "global"}, marks=pytest.mark.slow
        ),
        {"accumulate": 2, "skip_nonfinite": True},
        {"mixed_precision": "float16", "label_smoothing": 0.1},
    ],
    ids=lambda values: next(iter(values)) + "-" + str(next(iter(values.values()))),
)
def test_options_train(tmp_path, values):
    result = quick(tmp_path, **values)
    assert np.isfinite(result.history[-1]["loss"])
    assert result.history[-1]["grad_norm"] > 0
    fraction = result.history[-1]["clip_fraction"]
    assert fraction == 0 if values.get("clipper") == "none" else fraction >= 0
    assert keras.config.dtype_policy().name == "float32"  # the caller's, restored


def test_two_devices_take_the_same_steps_as_one(tmp_path):
    if len(tf.config.list_logical_devices("CPU")) < 2:
        pytest.skip("needs two logical devices")

    def build(num_outputs, image_size, model_class, options):
        # Without batch normalisation and dropout, which each device computes for its own half.
        inputs = keras.Input((image_size, image_size, 3))
        x = keras.layers.Conv2D(8, 3, strides=2, activation="relu")(inputs)
        outputs = keras.layers.Dense(num_outputs, "softmax")(keras.layers.Flatten()(x))
        return model_class(inputs, outputs)

    plain = dataclasses.replace(RECIPE, build=build)
    one, two = (
        run(
            plain,
            plain.options(devices=devices, limit_steps=3, epochs=1, verbose="quiet"),
            tmp_path / str(devices),
        ).history[0]
        for devices in (1, 2)
    )
    assert one["clip_fraction"] > 0
    assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_imagenet_mocked(tmp_path, devices):
    import tensorflow_datasets as tfds

    if len(tf.config.list_logical_devices("CPU")) < devices:
        pytest.skip("needs two logical devices")
    imagenet = dataclasses.replace(RECIPE, load_data=None)  # through --dataset, as users do
    options = imagenet.options(
        dataset="imagenet2012",
        data_dir=str(tmp_path),
        image_size=32,
        batch_size=8,
        devices=devices,
        mixed_precision="bfloat16",
        label_smoothing=0.1,
        **QUICK,
    )
    with tfds.testing.mock_data(num_examples=20):
        result = run(imagenet, options, tmp_path / "run")
    assert result.data.num_outputs == 1000
    # Untrained, the smoothed cross-entropy is that of a guess.
    assert result.history[0]["loss"] == pytest.approx(np.log(1000), rel=0.15)


def test_clip_config(tmp_path):
    import keras_gradclip as kgc

    spec = json.loads(json.dumps(kgc.serialize(kgc.AbsoluteClip(1e-9))))
    assert quick(tmp_path, clip_config=spec).clip_fraction > 0.5
    with pytest.raises(RecipeError):
        quick(tmp_path / "2", clip_config={"class_name": "NoSuchClip", "config": {}})


def test_smoothed_loss_is_that_of_keras_on_one_hot_labels():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(5), size=7).astype("float32")
    labels = rng.integers(0, 5, size=7)
    expected = keras.losses.CategoricalCrossentropy(label_smoothing=0.2)(
        keras.ops.one_hot(labels, 5), probabilities
    )
    loss = build.build_loss(RECIPE, RECIPE.options(label_smoothing=0.2))
    assert float(loss(labels, probabilities)) == pytest.approx(float(expected), rel=1e-6)
    copy = keras.losses.deserialize(keras.losses.serialize(loss))
    assert copy.label_smoothing == 0.2


def model_of(options):
    return RECIPE.build(10, 16, keras.Model, options)


def test_weight_decay_leaves_biases_and_norms_alone():
    options = RECIPE.options(weight_decay=0.5, warmup_epochs=0.0, learning_rate=0.1)
    model = model_of(options)
    optimizer = build.build_optimizer(options, model, steps=10)
    for variable in model.trainable_variables:
        variable.assign(np.ones(variable.shape))
    optimizer.build(model.trainable_variables)
    optimizer.apply([keras.ops.zeros(v.shape) for v in model.trainable_variables])
    for variable in model.trainable_variables:
        moved = float(keras.ops.max(keras.ops.abs(variable - 1)))
        assert (moved > 0) == (variable.path.endswith("kernel")), variable.path


def test_a_warmup_takes_at_most_a_fifth_of_the_run():
    options = RECIPE.options(warmup_epochs=1.0, epochs=1)
    assert build.warmup_updates(options, steps=20) == 4
    assert build.warmup_updates(RECIPE.options(warmup_epochs=1.0, epochs=8), steps=20) == 20


@pytest.mark.parametrize("accumulate", [1, 2])
def test_warmup_and_cosine(accumulate):
    options = RECIPE.options(learning_rate=0.8, warmup_epochs=1.0, epochs=5, accumulate=accumulate)
    model = model_of(options)
    schedule = build.build_optimizer(options, model, steps=20)._learning_rate
    updates = 20 * 5 // accumulate
    rates = np.array([float(schedule(step)) for step in range(updates + 1)])
    peak = 20 // accumulate
    assert rates[0] > 0
    assert np.all(np.diff(rates[: peak + 1]) > 0)
    assert rates[peak] == pytest.approx(0.8)
    assert np.all(np.diff(rates[peak:]) < 0)
    middle = (peak + updates) // 2
    assert rates[middle] == pytest.approx(0.4, rel=0.01)
    assert rates[-1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("rule", "rows", "kept"),
    [
        ("improve", [(0.5, 0.9), (0.7, 0.9), (0.6, 0.1)], 1),
        ("last", [(0.5, 0.9), (0.7, 0.9), (0.6, 0.1)], 2),
        ("last", [(0.5, 0.9), (float("nan"), 0.9)], 0),
        ("beats-test", [(0.5, 0.4), (0.7, 0.9), (0.6, 0.1)], 2),
        ("beats-test", [(0.5, 0.6), (0.7, 0.9)], None),
        ("improve", [(float("nan"), 0.9), (0.1, 0.9)], 1),
    ],
)
def test_rules_for_the_best_model(rule, rows, kept):
    logs = [
        {"epoch": epoch, "val_accuracy": val, "test_accuracy": test}
        for epoch, (val, test) in enumerate(rows, 1)
    ]
    assert RECIPE.kept_epoch(rule, logs) == kept


@pytest.mark.pictures
def test_beats_test_evaluates_the_test_split_and_a_monitor_writes_a_report(tmp_path):
    result = quick(tmp_path, select_best="beats-test", monitor=1)
    assert 0 <= result.history[0]["test_accuracy"] <= 1
    better = result.history[0]["val_accuracy"] > result.history[0]["test_accuracy"]
    assert result.kept == better == (tmp_path / "run" / folders.BEST).exists()
    page = (tmp_path / "run" / "monitor" / "report.html").read_text()
    assert "<html" in page and "kernel" in page


def test_validation_is_not_disturbed_by_training_metrics(finished):
    folder, _ = finished
    assert not [
        name
        for name in folders.read_history(folder / folders.HISTORY)[0]
        if name == "val_grad_norm"
    ]
