"""Driving logs in all their spellings, damage by row, the rendered drive, and the recipes."""

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from helpers import shapes_only
from PIL import Image

from recipes.data import driving_log as driving
from recipes.data import rendered
from recipes.driving import steering
from recipes.errors import DataError, RecipeError

pytestmark = pytest.mark.usefixtures("blank_pictures")

REAL_DRIVE = Path(__file__).resolve().parents[3] / "shared" / "drive"


@pytest.fixture(scope="module")
def drive(tmp_path_factory):
    """A rendered drive of 60 frames: its folder."""
    folder = tmp_path_factory.mktemp("drive")
    rendered.render_drive(folder, frames=60)
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


def test_an_image_that_trains_in_other_colours_is_found(copy, capsys):
    """A BMP with a palette, under any name: TensorFlow takes its numbers for grey levels."""
    folder, rows = copy
    write_log(folder, rows)
    victim = folder / "IMG" / "left_00010.jpg"
    palette = Image.open(victim).convert("P")
    palette.save(victim, "BMP")
    with pytest.raises(DataError, match=r"row 11: .*left_00010\.jpg: TensorFlow decodes it to"):
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
    for option in ({"correction": -1.0}, {"keep_straight": 1.5}, {"on_bad_data": "ignore"}):
        with pytest.raises(RecipeError, match=next(iter(option)).replace("_", "-")):
            small().options(**option)


@pytest.mark.parametrize("stretches", [1, 4])
def test_the_split_is_by_time_with_gaps_between_the_parts(stretches):
    frames = list(range(3000))
    parts = driving.split_by_time(frames, stretches)
    assert all(part == sorted(part) for part in parts)
    where = np.full(len(frames), -1)
    for k, part in enumerate(parts):
        assert np.all(where[part] == -1)  # no frame is in two parts
        where[part] = k
    assert [len(p) / 3000 for p in parts] == pytest.approx([0.8, 0.1, 0.1], abs=0.03)
    assert where[0] == 0 and where[-1] == 2
    changes = [k for k in where[np.r_[True, np.diff(where) != 0]] if k != -1]
    assert changes == [0, 1, 2] * stretches
    used = np.nonzero(where != -1)[0]
    apart = np.diff(used)[np.diff(where[used]) != 0]
    assert len(apart) == 3 * stretches - 1 and np.all(apart == 11)


def test_a_short_drive_is_split_without_gaps():
    parts = driving.split_by_time(list(range(37)))
    assert [x for part in parts for x in part] == list(range(37)) and min(map(len, parts)) > 0


def test_straight_frames_are_thinned_evenly():
    angles = [0.0, 0.1, 0.0, 0.0, -0.2, 0.0] * 10
    frames = [driving.Frame(Path(), Path(), Path(), a, i) for i, a in enumerate(angles)]
    assert driving.thin_straight(frames, 1.0) == frames
    assert driving.thin_straight(frames, 0.0) == [f for f in frames if f.steering]
    quarter = driving.thin_straight(frames, 0.25)
    assert [f for f in quarter if f.steering] == [f for f in frames if f.steering]
    rows = [f.row for f in quarter if not f.steering]
    assert len(rows) == 10 and np.ptp(np.diff(rows)) <= 2


def test_the_correction_of_the_rendered_driver_is_found(tmp_path):
    rendered.render_drive(tmp_path, frames=150, seed=3)
    frames = driving.read_log(tmp_path)
    assert driving.fit_correction(frames) == pytest.approx(rendered.SIDE_CORRECTION, abs=0.03)
    flat = [dataclasses.replace(f, steering=0.0) for f in frames[:60]]
    assert driving.fit_correction(flat) == 0


def test_side_cameras_are_corrected_in_training_alone(drive):
    data = driving.load(drive, (32, 32), correction=0.25, stretches=1)
    frames = driving.read_log(drive)
    assert (data.train.size, data.validation.size, data.test.size) == (3 * 47, 5, 6)
    assert data.decoding == {"image_shape": [32, 32]} and not data.class_names
    by_name = {
        p.decode().rsplit("/", 1)[1]: angle for p, angle in data.train.dataset.as_numpy_iterator()
    }
    for f in data.parts[0]:
        np.testing.assert_allclose(by_name[f.center.name], f.steering, atol=1e-6)
        np.testing.assert_allclose(by_name[f.left.name], f.steering + 0.25, atol=1e-6)
        np.testing.assert_allclose(by_name[f.right.name], f.steering - 0.25, atol=1e-6)
    held_out = [
        *data.validation.dataset.as_numpy_iterator(),
        *data.test.dataset.as_numpy_iterator(),
    ]
    np.testing.assert_allclose(
        [a for _, a in held_out], [f.steering for f in frames[48:53] + frames[54:]], atol=1e-6
    )
    assert all(b"center" in p for p, _ in held_out)


def test_examples_are_strips_and_mirroring_turns_the_angle(drive):
    data = driving.load(drive, (32, 48))
    path, angle = next(iter(data.train.dataset))
    x, y = data.preprocess_eval(path, angle)
    assert x.shape == (32, 48, 3) and x.dtype == "float32" and y.shape == (1,)
    assert float(abs(x).numpy().max()) <= 1
    whole = np.asarray(Image.open(path.numpy().decode()))
    strip = whole[int(80 * 0.35) : 80 - int(80 * 0.1)]
    np.testing.assert_allclose(x.numpy().mean(), strip.mean() / 127.5 - 1, atol=0.01)
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
        rendered.render_drive(tmp_path / name, frames=3, seed=seed)
    files = {
        name: {p.name: p.read_bytes() for p in sorted((tmp_path / name).rglob("*.*"))}
        for name in "abc"
    }
    assert len(files["a"]) == 10
    assert files["a"] == files["b"] != files["c"]


def test_the_rendered_road_shows_the_angle():
    """Where the road's middle line is says where to steer: offset, curvature, side cameras."""

    def middle(curvature=0.0, offset=0.0, heading=0.0, rows=slice(36, 50)):
        pixels = rendered._scene(0, curvature, offset, heading, 1.0, np.random.RandomState(0))
        road = np.abs(pixels[rows].astype(int) - (95, 95, 100)).max(-1) < 25
        return np.nonzero(road)[1].mean()

    assert middle() == pytest.approx(79.5, abs=1)
    assert middle(offset=1.0) < 77  # right of the middle: the road lies to the left
    assert middle(offset=-1.0) > 82
    assert middle(curvature=0.02) > 85  # a bend to the right
    assert middle(heading=0.1) < 75  # turned to the right: the road lies to the left


def test_scores_by_hand():
    angles, answers = np.array([0.0, 0.2, -0.4, 0.05]), np.array([0.1, 0.2, -0.2, 0.05])
    row = steering.scores(angles, answers, mean_angle=0.1)
    expected = {
        "frames": 4,
        "mae": 0.3 / 4,
        "mae_mean": 0.75 / 4,
        "mae_zero": 0.65 / 4,
        "mse": 0.05 / 4,
        "mse_mean": 0.2725 / 4,
        "r2": 1 - 0.05 / (0.2025 - 4 * 0.0375**2),
        "curves": 2,
        "curve_mae": 0.1,
        "curve_mae_mean": 0.3,
        "straight_mae": 0.05,
        "straight_mae_mean": 0.075,
    }
    assert row == pytest.approx(expected)
    constant = steering.scores(np.zeros(3), np.zeros(3), 0.0)
    assert np.isnan([constant["r2"], constant["curve_mae"]]).all() and constant["mae"] == 0


def test_signs_are_an_image_folder(tmp_path):
    folder = rendered.render_signs(tmp_path / "signs", per_class=12)
    from recipes import data

    signs = data.load(
        "image_folder", data_dir=str(folder), image_size=32, augment="shift", flip=False
    )
    assert signs.num_outputs == len(rendered.SIGNS) == 8
    assert (signs.train.size, signs.validation.size, signs.test.size) == (8 * 8, 16, 16)
    classes = {p.name for p in (folder / "train").iterdir()}
    assert classes == set(rendered.SIGNS)
    rendered.render_signs(tmp_path / "again", per_class=12)
    one = (folder / "test" / "stop" / "0000.png").read_bytes()
    assert (tmp_path / "again" / "test" / "stop" / "0000.png").read_bytes() == one


def tiny(num_outputs, image_size, model_class, options):
    """In place of a network: what the recipe does around it is what these tests look at."""
    import keras

    x = inputs = keras.Input((image_size, options.image_width, 3))
    x = keras.layers.Conv2D(8, 5, strides=4, activation="relu")(x)
    x = keras.layers.Flatten()(x)
    return model_class(inputs, keras.layers.Dense(num_outputs, name="predictions")(x))


def small(**settings):
    from recipes import driving_resnet50

    recipe = driving_resnet50.RECIPE
    settings = {**recipe.settings, "tensorboard": False, "batch_size": 16, **settings}
    return dataclasses.replace(recipe, build=tiny, settings=settings)


@pytest.mark.pictures
def test_the_report_is_of_the_kept_model_on_the_frames_of_the_log(drive, tmp_path, capsys):
    import keras

    from recipes.training import main

    folder = tmp_path / "run"
    status = main(small(epochs=2), ["--data-dir", str(drive), "--output", str(folder)])
    out = " ".join(capsys.readouterr().out.split())
    assert status == 0
    assert "absolute error, validation" in out and "(mean angle 0." in out
    assert "in the log's units" in out and "Best accuracy" not in out
    data = driving.load(drive, (32, 32))
    model = keras.saving.load_model(folder / "best.keras")
    frame = data.parts[2][3]
    image, _ = data.preprocess_eval(str(frame.center), np.float32(0))
    answer = float(model(image[None])[0, 0])
    with (folder / "angles.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(r["row"]) for r in rows] == sorted(f.row for part in data.parts for f in part)
    row = next(r for r in rows if int(r["row"]) == frame.row)
    assert row["part"] == "test" and float(row["angle"]) == frame.steering
    assert float(row["answer"]) == pytest.approx(answer, abs=1e-5)
    test = [r for r in rows if r["part"] == "test"]
    errors = [abs(float(r["angle"]) - float(r["answer"])) for r in test]
    with (folder / "steering.csv").open() as file:
        table = {r["part"]: r for r in csv.DictReader(file)}
    assert float(table["test"]["mae"]) == pytest.approx(np.mean(errors), abs=1e-6)
    assert f"absolute error, test {np.mean(errors):.4f}" in out.replace("│ ", "")
    for picture in ("drive.png", "frames.png"):
        with Image.open(folder / picture) as image:
            assert image.width > 900 and np.ptp(np.asarray(image.convert("L"))) > 100


def test_a_run_with_a_dead_zone_goes_on_without(drive, capsys):
    """Its config.json still names the option."""
    options = small().options(dead_zone=0.125, data_dir=str(drive))
    assert steering.load(options).train.size
    assert "warning: --dead-zone has no effect on steering" in capsys.readouterr().err


def test_options_of_images_by_class_have_no_effect_on_steering(drive, capsys):
    steering.load(small().options(flip=False, augment="none", data_dir=str(drive)))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"warning: --{n} has no effect on steering" for n in ("augment", "flip")]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["driving_resnet50", "driving_pilotnet"])
def test_a_real_drive_is_steered_better_than_by_a_constant(name, tmp_path):
    from recipes.registry import find_recipe
    from recipes.training import run

    if not REAL_DRIVE.is_dir():
        pytest.skip("no recorded drive beside the checkout")
    recipe = find_recipe(name)
    options = recipe.options(data_dir=str(REAL_DRIVE), tensorboard=False, verbose="line")
    recipe.report(run(recipe, options, tmp_path))
    with (tmp_path / "steering.csv").open() as file:
        for row in list(csv.DictReader(file))[1:]:
            assert float(row["mae"]) < float(row["mae_mean"]), row
            assert float(row["mse"]) < float(row["mse_mean"]), row


def test_the_recipe_refuses_bad_rows_or_leaves_them_out(copy, tmp_path, capsys):
    from recipes.training import main

    folder, rows = copy
    write_log(folder, [*rows[:4], ["broken"], *rows[4:]])
    recipe = small(epochs=1)
    flags = ["--data-dir", str(folder), "--limit-steps", "1"]
    assert main(recipe, [*flags, "--output", str(tmp_path / "a")]) == 2
    error = capsys.readouterr().err
    assert "driving_log.csv, row 5" in error and "Traceback" not in error
    skip = [*flags, "--output", str(tmp_path / "b"), "--on-bad-data", "skip"]
    assert main(recipe, skip) == 0
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
        steering.load(module.RECIPE.options(dataset="cifar10"))


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [("driving_resnet50", (32, 32), 23_589_761), ("driving_pilotnet", (66, 200), 252_219)],
)
def test_the_networks_have_one_linear_output(name, shape, parameters):
    import keras

    from recipes.registry import find_recipe

    recipe = find_recipe(name)
    options = recipe.options()
    with shapes_only():
        model = recipe.build(1, options.image_size, keras.Model, options)
    assert model.input_shape == (None, *shape, 3) and model.output_shape == (None, 1)
    assert model.count_params() == parameters
    assert model.layers[-1].activation is keras.activations.linear


def test_pilotnet_names_the_smallest_image():
    from recipes.models.pilotnet import pilotnet

    with pytest.raises(ValueError, match=r"image_shape=\(32, 200\).*61"):
        pilotnet(image_shape=(32, 200))
    assert pilotnet(image_shape=(61, 61)).output_shape == (None, 1)
