"""Driving logs in all their spellings, damage by row, the rendered drive, and the recipe."""

import csv
import dataclasses

import numpy as np
import pytest
from PIL import Image

from recipes.data import driving_log as driving
from recipes.errors import DataError, RecipeError


@pytest.fixture(scope="module")
def drive(tmp_path_factory):
    """A rendered drive of 60 frames: its folder."""
    folder = tmp_path_factory.mktemp("drive")
    driving.render_drive(folder, frames=60)
    return folder


def rows_of(folder):
    with (folder / "driving_log.csv").open(newline="") as file:
        return list(csv.reader(file))[1:]


def write_log(folder, rows, header=None):
    with (folder / "driving_log.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows] if header else rows)
    return folder


@pytest.fixture
def copy(drive, tmp_path):
    """The drive's images in a folder of the test's own; its rows."""
    (tmp_path / "IMG").mkdir()
    for image in (drive / "IMG").iterdir():
        (tmp_path / "IMG" / image.name).write_bytes(image.read_bytes())
    return tmp_path, rows_of(drive)


def seen(frames):
    return [(f.center.name, f.left.name, f.right.name, f.steering) for f in frames]


def test_the_rendered_log_reads_back_in_order(drive):
    frames = driving.read_log(drive)
    assert len(frames) == 60
    assert [f.row for f in frames] == list(range(2, 62))
    assert [f.center.name for f in frames] == [f"center_{i:05d}.jpg" for i in range(60)]
    np.testing.assert_allclose([f.steering for f in frames], [float(r[3]) for r in rows_of(drive)])
    assert seen(driving.read_log(drive / "driving_log.csv")) == seen(frames)


@pytest.mark.parametrize(
    "spelling",
    [
        lambda name: f"IMG/{name}",
        lambda name: f" IMG/{name}",
        lambda name: f"IMG\\{name}",
        lambda name: f"C:\\Users\\someone\\Desktop\\data\\IMG\\{name}",
        lambda name: f"/home/someone/data/IMG/{name}",
        lambda name: name,
    ],
    ids=["relative", "space", "backslash", "windows", "absolute", "bare"],
)
@pytest.mark.parametrize("header", [None, driving.COLUMNS], ids=["bare", "header"])
def test_paths_of_any_machine(copy, spelling, header):
    folder, rows = copy
    expected = [(*(cell.removeprefix("IMG/") for cell in r[:3]), float(r[3])) for r in rows]
    spelt = [[*(spelling(cell.removeprefix("IMG/")) for cell in r[:3]), *r[3:]] for r in rows]
    assert seen(driving.read_log(write_log(folder, spelt, header))) == expected


def test_images_beside_the_log_and_absolute_paths_that_exist(copy, tmp_path):
    folder, rows = copy
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    absolute = [[*(str(folder / cell) for cell in r[:3]), *r[3:]] for r in rows]
    log = write_log(elsewhere, absolute)
    assert driving.read_log(log)[0].center == folder / rows[0][0]
    for image in (folder / "IMG").iterdir():
        image.rename(elsewhere / image.name)
    assert driving.read_log(log)[0].center == elsewhere / rows[0][0].removeprefix("IMG/")


def test_a_header_may_order_the_columns_and_lines_may_be_blank(copy):
    folder, rows = copy
    header = ["Steering", "right", "left", "center"]
    turned = [[r[3], r[2], r[1], r[0]] for r in rows]
    frames = driving.read_log(write_log(folder, [turned[0], [], *turned[1:], []], header))
    assert seen(frames)[0] == (
        "center_00000.jpg",
        "left_00000.jpg",
        "right_00000.jpg",
        float(rows[0][3]),
    )
    assert len(frames) == 60 and frames[1].row == 4
    with pytest.raises(DataError, match="row 1: the header has no column 'left'"):
        driving.read_log(write_log(folder, rows, ["center", "steering"]))


DAMAGE = {
    "short row": (lambda row: row[:2], "2 columns"),
    "word for a number": (lambda row: [*row[:3], "fast", *row[4:]], "steering='fast'"),
    "nan": (lambda row: [*row[:3], "nan", *row[4:]], "steering='nan'"),
    "infinity": (lambda row: [*row[:3], "-inf", *row[4:]], "steering='-inf'"),
    "no such image": (lambda row: ["IMG/lost.jpg", *row[1:]], "IMG/lost.jpg"),
    "empty path": (lambda row: ["", *row[1:]], "empty"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_bad_rows_are_refused_or_skipped_by_name(copy, capsys, kind):
    folder, rows = copy
    spoil, words = DAMAGE[kind]
    write_log(folder, [*rows[:6], spoil(rows[6]), *rows[7:]])
    with pytest.raises(DataError) as error:
        driving.read_log(folder)
    for word in ("driving_log.csv, row 7", words, "--on-bad-data skip"):
        assert word in str(error.value)
    frames = driving.read_log(folder, on_bad_data="skip")
    assert [f.row for f in frames] == [*range(1, 7), *range(8, 61)]
    reported = capsys.readouterr().err
    assert "driving_log.csv, row 7" in reported and words in reported


@pytest.mark.parametrize("camera", ["center", "left", "right"])
def test_truncated_images_are_found_in_each_camera(copy, capsys, camera):
    folder, rows = copy
    write_log(folder, rows)
    victim = folder / "IMG" / f"{camera}_00010.jpg"
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"row 11: .*{camera}_00010\.jpg.*truncated"):
        driving.read_log(folder)
    assert len(driving.read_log(folder, on_bad_data="skip")) == 59
    assert victim.name in capsys.readouterr().err


def test_logs_that_cannot_be_read(tmp_path, copy):
    folder, rows = copy
    with pytest.raises(DataError, match="not a file"):
        driving.read_log(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no usable row"):
        driving.read_log(write_log(folder, []))
    with pytest.raises(DataError, match="10 usable rows"):
        driving.load(write_log(folder, rows[:10]))
    with pytest.raises(DataError, match="correction=-1"):
        driving.load(folder, correction=-1)
    with pytest.raises(DataError, match="ignore"):
        driving.read_log(folder, on_bad_data="ignore")


def test_the_split_is_by_time():
    parts = driving.split_by_time(list(range(100)))
    assert parts == (list(range(80)), list(range(80, 90)), list(range(90, 100)))
    short = driving.split_by_time(list(range(37)))
    assert [x for part in short for x in part] == list(range(37)) and min(map(len, short)) > 0


def test_side_cameras_are_corrected_in_training_alone(drive):
    data = driving.load(drive, image_size=32, correction=0.25)
    frames = driving.read_log(drive)
    assert (data.train.size, data.validation.size, data.test.size) == (3 * 48, 6, 6)
    by_name = {
        p.decode().rsplit("/", 1)[1]: angle for p, angle in data.train.dataset.as_numpy_iterator()
    }
    for f in frames[:48]:
        np.testing.assert_allclose(by_name[f.center.name], f.steering, atol=1e-6)
        np.testing.assert_allclose(by_name[f.left.name], f.steering + 0.25, atol=1e-6)
        np.testing.assert_allclose(by_name[f.right.name], f.steering - 0.25, atol=1e-6)
    held_out = [
        *data.validation.dataset.as_numpy_iterator(),
        *data.test.dataset.as_numpy_iterator(),
    ]
    np.testing.assert_allclose(
        [a for _, a in held_out], [f.steering for f in frames[48:]], atol=1e-6
    )
    assert all(b"center" in p for p, _ in held_out)


def test_examples_are_strips_and_mirroring_turns_the_angle(drive):
    data = driving.load(drive, image_size=32)
    path, angle = next(iter(data.train.dataset))
    x, y = data.preprocess_eval(path, angle)
    assert x.shape == (32, 32, 3) and x.dtype == "float32" and y.shape == (1,)
    assert float(abs(x).numpy().max()) <= 1
    whole = np.asarray(Image.open(path.numpy().decode()))
    strip = whole[int(80 * 0.35) : 80 - int(80 * 0.1)]
    # Resized without antialiasing: the mean of the pixels stays nearly the same.
    np.testing.assert_allclose(x.numpy().mean(), strip.mean() / 127.5 - 1, atol=0.03)
    signs = set()
    for i in range(12):
        xt, yt = data.preprocess_train((path, angle), np.array([5, i], "int64"))
        sign = float(np.sign(yt[0] * angle))
        signs.add(sign)
        upright = xt[:, ::-1] if sign < 0 else xt
        # Up to the light, which shifts all pixels alike (and is clipped at the ends).
        inside = (np.abs(upright) < 0.99) & (np.abs(x) < 0.79)
        shift = (np.asarray(upright) - np.asarray(x))[inside]
        assert np.ptp(shift) < 1e-4 and abs(shift[0]) <= 0.2
        again = data.preprocess_train((path, angle), np.array([5, i], "int64"))
        np.testing.assert_array_equal(again[0], xt)
    assert signs == {-1.0, 1.0}


def test_rendering_is_deterministic_and_seeded(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        driving.render_drive(tmp_path / name, frames=3, seed=seed)
    files = {
        name: {p.name: p.read_bytes() for p in sorted((tmp_path / name).rglob("*.*"))}
        for name in "abc"
    }
    assert len(files["a"]) == 10
    assert files["a"] == files["b"] != files["c"]


def test_the_rendered_road_shows_the_angle():
    """Where the road's middle line is says where to steer: offset, curvature, side cameras."""

    def middle(curvature=0.0, offset=0.0, heading=0.0, rows=slice(36, 50)):
        pixels = driving._scene(0, curvature, offset, heading, 1.0, np.random.RandomState(0))
        road = np.abs(pixels[rows].astype(int) - (95, 95, 100)).max(-1) < 25
        return np.nonzero(road)[1].mean()

    assert middle() == pytest.approx(79.5, abs=1)
    assert middle(offset=1.0) < 77  # right of the middle: the road lies to the left
    assert middle(offset=-1.0) > 82
    assert middle(curvature=0.02) > 85  # a bend to the right
    assert middle(heading=0.1) < 75  # turned to the right: the road lies to the left


def test_the_mean_baseline_by_hand(drive):
    data = driving.load(drive, image_size=32)
    frames = driving.read_log(drive)
    # The corrections of left and right cancel in the mean.
    mean = np.mean([f.steering for f in frames[:48]])
    expected = np.mean([abs(f.steering - mean) for f in frames[48:54]])
    assert driving.mean_baseline(data, data.validation) == pytest.approx(expected, abs=1e-6)


def test_signs_are_an_image_folder(tmp_path):
    folder = driving.render_signs(tmp_path / "signs", per_class=12)
    from recipes.data import sets as data

    signs = data.load(
        "image_folder", data_dir=str(folder), image_size=32, augment="shift", flip=False
    )
    assert signs.num_outputs == len(driving.SIGNS) == 8
    assert (signs.train.size, signs.validation.size, signs.test.size) == (8 * 8, 16, 16)
    classes = {p.name for p in (folder / "train").iterdir()}
    assert classes == set(driving.SIGNS)
    driving.render_signs(tmp_path / "again", per_class=12)
    one = (folder / "test" / "stop" / "0000.png").read_bytes()
    assert (tmp_path / "again" / "test" / "stop" / "0000.png").read_bytes() == one


def tiny(num_outputs, image_size, model_class, options):
    """In place of ResNet-50: what the recipe does around it is what these tests look at."""
    import keras

    x = inputs = keras.Input((image_size, image_size, 3))
    x = keras.layers.Conv2D(8, 5, strides=4, activation="relu")(x)
    x = keras.layers.Flatten()(x)
    return model_class(inputs, keras.layers.Dense(num_outputs, name="predictions")(x))


def test_the_recipe_reports_the_error_in_the_units_of_the_log(drive, tmp_path, capsys):
    from recipes import driving_resnet50
    from recipes.training import session as training

    recipe = dataclasses.replace(driving_resnet50.RECIPE, build=tiny)
    status = training.main(
        recipe,
        ["--data-dir", str(drive), "--epochs", "3", "--batch-size", "16", "--no-tensorboard"]
        + ["--output", str(tmp_path / "run")],
    )
    out = capsys.readouterr().out
    assert status == 0
    assert "mean absolute error, validation" in out and "always the mean angle" in out
    assert "units of the log" in out and "Best accuracy" not in out
    data = driving.load(drive, 32)
    assert f"{driving.mean_baseline(data, data.validation):.4f}" in " ".join(out.split())


def test_the_recipe_refuses_bad_rows_or_leaves_them_out(copy, tmp_path, capsys):
    from recipes import driving_resnet50
    from recipes.training import session as training

    folder, rows = copy
    write_log(folder, [*rows[:4], ["broken"], *rows[4:]])
    recipe = dataclasses.replace(driving_resnet50.RECIPE, build=tiny)
    flags = ["--data-dir", str(folder), "--epochs", "1", "--limit-steps", "1"]
    flags += ["--batch-size", "8", "--no-tensorboard"]
    assert training.main(recipe, [*flags, "--output", str(tmp_path / "a")]) == 2
    error = capsys.readouterr().err
    assert "driving_log.csv, row 5" in error and "Traceback" not in error
    skip = [*flags, "--output", str(tmp_path / "b"), "--on-bad-data", "skip"]
    assert training.main(recipe, skip) == 0
    assert "driving_log.csv, row 5" in capsys.readouterr().err


def test_the_task_chooses_the_recipe():
    from recipes import driving_resnet50 as module

    assert module.choose([]) is module.RECIPE
    assert module.choose(["--epochs", "3", "--task", "signs"]) is module.SIGNS
    assert module.choose(["--task=signs", "--no-tensorboard"]) is module.SIGNS
    assert module.choose(["--task", "fly"]) is module.RECIPE  # whose options then refuse the word
    with pytest.raises(RecipeError, match="fly"):
        module.RECIPE.options(task="fly")
    with pytest.raises(RecipeError, match=r"cifar10.*--task signs"):
        module.load_drive(module.RECIPE.options(dataset="cifar10"))


def test_the_network_has_one_linear_output():
    import keras

    from recipes import driving_resnet50 as module

    with keras.StatelessScope(initialize_variables=False):
        model = module.build(1, 32, keras.Model, module.RECIPE.options())
    assert model.output_shape == (None, 1)
    assert model.layers[-1].activation is keras.activations.linear
