"""From a folder of images to names: the classes of a run, and `recipes/predict.py`."""

import dataclasses
import json
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tiny_recipe import RECIPE

from recipes import predict
from recipes.data import driving_log, load
from recipes.training import evaluation, main

pytestmark = pytest.mark.usefixtures("blank_pictures")

SIDES = ("left", "right", "top Ä", "[red]bottom")


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """A model that tells on which side an image is bright, in the folder of a run."""
    folder = tmp_path_factory.mktemp("sides")
    y, x = np.mgrid[-1:1:8j, -1:1:8j]
    kernel = np.stack([-x, x, -y, y], -1)[:, :, None].repeat(3, 2).reshape(-1, 4)
    inputs = keras.Input((8, 8, 3))
    dense = keras.layers.Dense(4, "softmax")
    model = keras.Model(inputs, dense(keras.layers.Flatten()(inputs)))
    dense.set_weights([kernel, np.zeros(4)])
    model.save(folder / "best.keras")
    content = {"classes": SIDES, "decoding": {"image_size": 8, "augment": "shift"}}
    (folder / "best.classes.json").write_text(json.dumps(content))
    return folder


def photo(path, side, orientation=1, mode="RGB"):
    """A picture that a viewer shows bright on one side."""
    pixels = np.full((40, 60), 20, np.uint8)
    place = {"left": np.s_[:, :30], "right": np.s_[:, 30:], "top": np.s_[:20], "bottom": np.s_[20:]}
    pixels[place[side]] = 230
    image = Image.fromarray(pixels)
    # What undoes the turn that EXIF asks for.
    back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}
    back |= {8: Image.Transpose.ROTATE_270, 2: Image.Transpose.FLIP_LEFT_RIGHT}
    image = image.transpose(back[orientation]) if orientation in back else image
    tags = Image.Exif()
    tags[0x0112] = orientation
    image.convert(mode).save(path, exif=tags)
    return str(path)


def lines(argv, capsys, status=0):
    """What the command prints."""
    assert predict.main([str(word) for word in argv]) == status
    printed = capsys.readouterr()
    return (printed.err if status else printed.out).splitlines()


@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 8])
def test_predict_names_what_a_viewer_shows(sides, orientation, tmp_path, capsys):
    kinds = (("a b.JPG", "left", "RGB"), ("ü.png", "top", "RGBA"), ("grey.jpeg", "bottom", "L"))
    paths = [photo(tmp_path / n, side, orientation, mode) for n, side, mode in kinds]
    for run in (sides, sides / "best.keras"):
        printed = lines([run, *paths], capsys)
        assert [line.split(": ")[0] for line in printed] == paths
        for line, name in zip(printed, ("left", "top Ä", "[red]bottom"), strict=True):
            answers = [a.rsplit(" ", 2) for a in line.split(": ")[1].split(", ")]
            assert len(answers) == 3 and answers[0][0] == name
            shares = [float(share) for _, share, _ in answers]
            assert shares == sorted(shares, reverse=True) and shares[0] > 60


def test_predict_tells_the_angle_of_a_driving_model(tmp_path, capsys):
    """Of the strip of road that it was trained on: here the brightness of the image's middle."""
    inputs = keras.Input((4, 8, 3))
    outputs = keras.layers.Reshape((1,))(keras.ops.mean(inputs, axis=(1, 2, 3))[:, None])
    keras.Model(inputs, outputs).save(tmp_path / "best.keras")
    content = {"classes": [], "decoding": {"image_shape": [4, 8]}}
    (tmp_path / "best.classes.json").write_text(json.dumps(content))
    image = photo(tmp_path / "a.png", "bottom")
    strip = driving_log.road(tf.constant(image), (4, 8)).numpy()
    assert lines([tmp_path, image], capsys) == [f"{image}: steering angle {strip.mean():+.4f}"]


MISTAKES = {
    "no run": (["{tmp}/absent", "{image}"], "absent is neither the folder of a run nor a .keras"),
    "another folder": (["{tmp}", "{image}"], "has no best.keras: it is not the folder of a run"),
    "no model": (["{image}", "{image}"], "a.png is neither the folder of a run nor a .keras file"),
    "no image named": (["{run}"], "the following arguments are required: IMAGE"),
    "absent": (["{run}", "{tmp}/absent.png"], "{tmp}/absent.png: no such file"),
    "a folder": (["{run}", "{tmp}"], "{tmp} is a folder: name its images, such as {tmp}/*.jpg"),
    "a text": (["{run}", "{image}", "{tmp}/text.jpg"], "text.jpg: cannot identify image file"),
    "half": (["{run}", "{tmp}/half.png"], "{tmp}/half.png: Truncated File Read"),
    "no names": (["{tmp}/alone.keras", "{image}"], "{tmp}/alone.classes.json is missing"),
    "no JSON": (["{tmp}/broken.keras", "{image}"], "{tmp}/broken.classes.json, line 1: not JSON"),
    "a list": (["{tmp}/list.keras", "{image}"], "{tmp}/list.classes.json: holds no 'classes'"),
    "no zip": (["{tmp}/text.keras", "{image}"], "text.keras"),
    "other names": (["{tmp}/few.keras", "{image}"], "4 outputs, and the file of its class names 1"),
    "a bad size": (["{tmp}/size.keras", "{image}"], "'size' must be"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_line(kind, sides, tmp_path, capsys):
    argv, line = MISTAKES[kind]
    image = photo(tmp_path / "a.png", "left")
    (tmp_path / "half.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "text.keras").write_text("no model")
    whole = (sides / "best.classes.json").read_text()
    for name, content in {
        "alone": None,
        "broken": "{",
        "list": "[1]",
        "few": whole.replace(json.dumps(SIDES), '["one"]'),
        "size": whole.replace("8", '"large"'),
        "text": whole,
    }.items():
        if name != "text":
            (tmp_path / f"{name}.keras").write_bytes((sides / "best.keras").read_bytes())
        if content is not None:
            (tmp_path / f"{name}.classes.json").write_text(content)
    places = {"tmp": tmp_path, "run": sides, "image": image}
    printed = lines([word.format(**places) for word in argv], capsys, status=2)
    assert len(printed) == 1 and printed[0].startswith("error: ")
    assert line.format(**places) in printed[0]


def test_help_and_mistakes_do_not_wait_for_tensorflow():
    code = (
        "import sys; from recipes.predict import main; assert main(['absent', __file__]) == 2\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'tensorflow', 'keras', 'numpy'} & set(sys.modules)"
    )
    code = code.replace("__file__", repr(__file__))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "RUN" in done.stdout and "IMAGE" in done.stdout


# ------------------------------------------------------------------------------- evaluation


def test_the_confusion_matrix_counts_each_image_once():
    rng = np.random.default_rng(0)
    labels, guesses = rng.integers(0, 5, (2, 100))
    metric = evaluation.Confusion(5)
    for part in np.split(np.arange(100), [30, 33]):
        metric.update_state(labels[part], np.eye(5, dtype="float32")[guesses[part]])
    expected = np.zeros((5, 5))
    np.add.at(expected, (labels, guesses), 1)
    assert np.array_equal(keras.ops.convert_to_numpy(metric.counts), expected)
    assert float(metric.result()) == pytest.approx(np.mean(labels == guesses))


@pytest.mark.parametrize("labels", ["labels", "one-hot", "no names"])
def test_only_labels_of_named_classes_are_counted(labels, sides, tmp_path):
    """A recipe's own data may have names left from the set that it is made of."""
    data = load(image_size=8)
    data = dataclasses.replace(data, class_names=SIDES if labels != "no names" else ())
    x, y = np.random.default_rng(0).random((12, 8, 8, 3), "float32"), np.arange(12) % 4
    kind = "categorical" if labels == "one-hot" else "sparse_categorical"
    batches = tf.data.Dataset.from_tensor_slices((x, np.eye(4)[y] if labels == "one-hot" else y))
    model = keras.models.load_model(sides / "best.keras", compile=False)
    scores = evaluation.evaluate(
        model, batches.batch(5), data, tmp_path, f"{kind}_crossentropy", [f"{kind}_accuracy"]
    )
    assert set(scores) == {"loss", f"{kind}_accuracy"}
    written = {path.name for path in tmp_path.iterdir()}
    assert written == ({"classes.csv", "confusion.png"} if labels == "labels" else set())


@pytest.mark.pictures
@pytest.mark.parametrize("size", [2, 3, 10, 100])
def test_classes_as_table_and_picture(size, tmp_path, capsys):
    names = [r"$\frac", "[red] Ä", "no images", *(f"class {i}" for i in range(3, size))][:size]
    counts = 8 * np.eye(size, dtype=int)
    counts[0, 1] = 2
    if size > 2:
        counts[2] = 0
    evaluation.write_classes(tmp_path, counts, names, "a $title")
    rows = (tmp_path / "classes.csv").read_text(encoding="utf-8").splitlines()
    assert rows[:2] == ["class,images,accuracy,taken_for", r"$\frac,10,0.8000,[red] Ä"]
    if size > 2:
        assert rows[3] == "no images,0,,"
    with Image.open(tmp_path / "confusion.png") as image:
        assert min(image.size) > 200
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20
    evaluation.print_classes(tmp_path)
    printed = capsys.readouterr().out
    if size > 20:
        assert printed.count("\n") <= 2 and "classes.csv" in printed.replace("\n", "")
    else:
        assert all(words in printed for words in (names[0], "80.0 %", "[red] Ä"))


def test_long_names_stay_apart_in_the_picture():
    names = [f"a class with a long name {i:03}" for i in range(20)]
    short = {evaluation._short(name) for name in names}
    assert len(short) == 20 and max(map(len, short)) == 24


def test_a_run_without_classes_prints_none(tmp_path, capsys):
    evaluation.print_classes(tmp_path)
    assert capsys.readouterr().out == ""


@pytest.mark.pictures
def test_twenty_photos_from_training_to_predict(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place, side in (("my photos/linke Hälfte", "left"), ("my photos/right", "right")):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / ".DS_Store").write_bytes(b"\0")
        for i in range(10):
            mode, ending = (("RGB", "JPG"), ("L", "jpg"), ("RGBA", "png"))[i % 3]
            photo(tmp_path / place / f"photo {i}.{ending}", side, (1, 6, 3)[i // 4], mode)
    recipe = dataclasses.replace(RECIPE, load_data=None)
    argv = ["--dataset", "image_folder", "--data-dir", "my photos", "--batch-size", "8"]
    # Mirrored images would have the other side's class.
    argv += ["--epochs", "10", "--no-flip", "--augment", "none", "--verbose", "quiet"]
    assert main(recipe, argv) == 0
    printed = capsys.readouterr().out
    assert "test images by class" in printed and "linke Hälfte" in printed
    run = tmp_path / "runs" / "tiny"
    assert evaluation.read_names(run / "best.keras")[0] == ["linke Hälfte", "right"]
    assert (run / "classes.csv").read_text(encoding="utf-8").count("\n") == 3
    assert (run / "confusion.png").stat().st_size > 1000
    images = [photo(tmp_path / "new left.jpg", "left", 6), photo(tmp_path / "new.png", "right", 3)]
    first, second = lines(["runs/tiny", *images], capsys)
    assert first.startswith(f"{images[0]}: linke Hälfte ") and " right " in second
    # The same numbers as in the run's own evaluation.
    data = load("image_folder", "my photos", image_size=16, augment="none")
    model = keras.models.load_model(run / "best.keras", compile=False)
    file = next(iter(data.test.dataset))
    share = model.predict(data.preprocess_eval(*file)[0][None], verbose=0)[0].max()
    (line,) = lines(["runs/tiny", file[0].numpy().decode()], capsys)
    assert line.split(", ")[0].endswith(f" {100 * share:.1f} %")
