"""Data of the recipes: splits, order, augmentation, and what happens to damaged or missing data."""

import io
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from recipes import data
from recipes.data import images
from recipes.data.image_folder import image_problem
from recipes.data.mnist_embedded import MnistEmbedded, split_rows
from recipes.errors import DataError

CIFAR_DIR = Path(__file__).resolve().parents[3] / "shared" / "tfds"


@pytest.fixture(scope="module")
def mnist():
    return data.load(image_size=32)


def as_arrays(batches):
    return [(x.numpy(), y.numpy()) for x, y in batches]


def same(left, right):
    return len(left) == len(right) and all(
        np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])
        for a, b in zip(left, right, strict=True)
    )


# ----------------------------------------------------------------------------- embedded MNIST


def test_embedded_splits_are_disjoint_balanced_and_complete():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 500))
    rows = split_rows(labels)
    assert {name: len(part) for name, part in rows.items()} == {
        "train": 4000,
        "validation": 500,
        "test": 500,
    }
    assert sorted(np.concatenate(list(rows.values()))) == list(range(5000))
    for part in rows.values():
        assert set(Counter(labels[part]).values()) == {len(part) // 10}
    again = split_rows(labels)
    assert all(np.array_equal(rows[name], again[name]) for name in rows)


def test_embedded_mnist_as_read_back(mnist):
    assert (mnist.train.size, mnist.validation.size, mnist.test.size) == (4000, 500, 500)
    labels = [int(label) for _, label in mnist.test.dataset]
    assert Counter(labels) == {digit: 50 for digit in range(10)}
    assert mnist.num_outputs == 10


@pytest.mark.parametrize(
    ("split", "code"), [("train", 2919929789), ("validation", 2872718405), ("test", 1770625028)]
)
def test_the_order_of_the_embedded_digits_is_that_of_their_files_in_0_2(split, code):
    """A run that began then, with the data set in files of TFDS, goes on with the same batches."""
    whole = MnistEmbedded().as_dataset(split=split, batch_size=-1)
    assert zlib.crc32(whole["image"].numpy().tobytes() + whole["label"].numpy().tobytes()) == code


def test_a_folder_for_the_embedded_digits_is_a_mistake(tmp_path):
    with pytest.raises(DataError, match=r"needs no folder; .*--dataset image_folder"):
        data.load(data_dir=str(tmp_path))
    (tmp_path / "mnist_embedded").mkdir()  # as a run of 0.2 may have left it
    assert data.load(data_dir=str(tmp_path), image_size=32).train.size == 4000


def test_evaluation_sees_each_example_once_scaled(mnist):
    batches = data.Feed(mnist, 64).evaluation(mnist.validation)
    assert int(batches.cardinality()) == 8
    images = np.concatenate([x for x, _ in as_arrays(batches)])
    assert images.shape == (500, 32, 32, 3)
    assert images.dtype == np.float32
    assert images.min() == -1.0
    assert 0.9 < images.max() <= 1.0
    assert np.array_equal(images[..., 0], images[..., 2])  # grey


# --------------------------------------------------------------------------------------- order


def test_stream_resumes_at_any_step(mnist):
    whole = as_arrays(data.Feed(mnist, 64, 3).training().take(70))
    # 62 steps an epoch: within the first, at the boundary, within the second.
    for start in (5, 62, 66):
        rest = data.Feed(mnist, 64, 3).training(start).take(70 - start)
        assert same(as_arrays(rest), whole[start:])


def test_stream_differs_by_epoch_and_seed_but_not_by_the_global_seed(mnist):
    first = as_arrays(data.Feed(mnist, 64, 0).training().take(1))
    tf.random.set_seed(99)
    assert same(as_arrays(data.Feed(mnist, 64, 0).training().take(1)), first)
    assert not same(as_arrays(data.Feed(mnist, 64, 1).training().take(1)), first)
    second_epoch = data.Feed(mnist, 64, 0).training(62).take(1)
    assert not same(as_arrays(second_epoch), first)


def test_an_epoch_has_each_example_at_most_once():
    numbers = data.Split(tf.data.Dataset.range(100), 100)
    plain = data.Data(
        numbers, numbers, numbers, lambda x, seed: (x, seed), lambda x: (x, x), 1, "numbers"
    )
    batches = as_arrays(data.Feed(plain, 30, 0).training().take(6))
    for epoch in (batches[:3], batches[3:]):
        seen = np.concatenate([x for x, _ in epoch])
        assert len(set(seen)) == 90
    # The rest that is dropped is not the same one in each epoch ...
    assert {*np.concatenate([x for x, _ in batches])} > {
        *np.concatenate([x for x, _ in batches[:3]])
    }
    # ... and no two examples share the seed of their augmentation.
    seeds = np.concatenate([seed for _, seed in batches])
    assert len({tuple(seed) for seed in seeds}) == 180


def test_steps_per_epoch(mnist):
    assert data.Feed(mnist, 64).steps == 62
    assert data.Feed(mnist, 64, limit=5).steps == 5
    with pytest.raises(DataError, match="batch-size=5000"):
        data.Feed(mnist, 5000).training()


def test_global_batch_is_split_over_replicas(mnist):
    devices = [device.name for device in tf.config.list_logical_devices("CPU")][:2]
    if len(devices) < 2:
        pytest.skip("needs two logical devices")
    strategy = tf.distribute.MirroredStrategy(devices)
    batches = data.Feed(mnist, 64, 0).training()
    whole = next(iter(batches))[1].numpy()
    parts = next(iter(strategy.experimental_distribute_dataset(batches)))[1].values
    assert [part.shape[0] for part in parts] == [32, 32]
    assert np.array_equal(np.concatenate([part.numpy() for part in parts]), whole)


# -------------------------------------------------------------------------------------- images


def encoded(array, kind="png"):
    encode = {"png": tf.io.encode_png, "jpeg": tf.io.encode_jpeg}[kind]
    return encode(tf.constant(array))


def random_image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_evaluation_crop_is_the_central_224_of_256():
    pixels = random_image(256, 320)
    image = images.decode_eval(encoded(pixels), 224, "imagenet").numpy()
    assert np.array_equal(image, pixels[16:240, 48:272].astype(np.float32))


def test_evaluation_without_crop_keeps_the_whole_image():
    pixels = random_image(40, 40)
    image = images.decode_eval(encoded(pixels), 40, "shift").numpy()
    assert np.array_equal(image, pixels.astype(np.float32))


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_random_crop_is_a_function_of_the_seed(kind):
    # Red is the column, green the row: a crop shows where it came from.
    column, row = np.meshgrid(np.arange(200), np.arange(160))
    pixels = np.stack([column, row, 0 * row], axis=-1).astype(np.uint8)
    source = encoded(pixels, kind)
    crops = []
    for index in range(20):
        seed = tf.constant([7, index], tf.int64)
        crop = images.decode_train(source, seed, 32, "imagenet", flip=False).numpy()
        again = images.decode_train(source, seed, 32, "imagenet", flip=False).numpy()
        assert np.array_equal(crop, again)
        crops.append(crop)
    assert crops[0].shape == (32, 32, 3)
    widths = np.array([np.ptp(crop[..., 0]) for crop in crops]) / 200
    heights = np.array([np.ptp(crop[..., 1]) for crop in crops]) / 160
    areas = widths * heights
    assert areas.min() > 0.03 and areas.max() <= 1.05  # edges blur in resize and JPEG
    assert np.std(areas) > 0.05


def test_flip_mirrors_about_half():
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, :8] = 255
    mirrored = 0
    for index in range(40):
        image = images.decode_train(
            encoded(pixels), tf.constant([1, index], tf.int64), 16, "none", flip=True
        ).numpy()
        mirrored += image[0, 0, 0] == 0
    assert 8 < mirrored < 32


def test_shift_moves_by_an_eighth_at_most():
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[16, 16] = 255
    places = set()
    for index in range(40):
        image = images.decode_train(
            encoded(pixels), tf.constant([1, index], tf.int64), 32, "shift", flip=False
        ).numpy()
        places.add(tuple(np.argwhere(image[..., 0] == 255)[0] - 16))
    assert np.abs(list(places)).max() <= 4
    assert len(places) > 10


def test_digits_are_not_mirrored_by_default(mnist):
    seen = data.load(image_size=32, augment="none")
    batch, _ = next(iter(data.Feed(seen, 256, 0).training()))
    originals = {x.tobytes() for x, _ in as_arrays(seen.train.dataset.map(seen.preprocess_eval))}
    assert all(image.numpy().tobytes() in originals for image in batch)


# ---------------------------------------------------------------------------------------- TFDS


def test_misspelt_name_suggests(tmp_path):
    with pytest.raises(DataError, match=r"'cifar1' is not a TFDS name: did you mean cifar10 "):
        data.load("cifar1", data_dir=str(tmp_path))


def test_data_set_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"not prepared in .*--download"):
        data.load("cifar10", data_dir=str(tmp_path))
    with pytest.raises(DataError, match="is not a folder"):
        data.load("cifar10", data_dir=str(tmp_path / "absent"))


def test_data_set_without_images(tmp_path):
    with pytest.raises(DataError, match="an image and a class label"):
        data.load("ag_news_subset", data_dir=str(tmp_path))


def test_splits_must_be_three():
    with pytest.raises(DataError, match="must name three"):
        data.load(splits="train,test")
    chosen = data.load(splits="train[:10%],train[10%:20%],test", image_size=32)
    assert (chosen.train.size, chosen.validation.size, chosen.test.size) == (400, 400, 500)
    assert chosen.note == "its train[:10%], train[10%:20%], test"
    assert data.load(image_size=32).note == ""


@pytest.mark.parametrize(
    "splits",
    [
        "train,validation,validation",
        "train,train[90%:],test",
        "train[:60%],validation,train[50%:]",
        "train+validation,validation[:5%],test",
    ],
)
def test_splits_that_share_examples_are_refused(splits):
    with pytest.raises(DataError, match="share examples"):
        data.load(splits=splits, image_size=32)


@pytest.mark.skipif(not CIFAR_DIR.is_dir(), reason="no CIFAR-10 subset beside the checkout")
def test_cifar10_subset():
    cifar = data.load("cifar10", data_dir=str(CIFAR_DIR), image_size=32)
    assert (cifar.train.size, cifar.validation.size, cifar.test.size) == (4500, 500, 1000)
    assert cifar.class_names[:2] == ("airplane", "automobile") and cifar.num_outputs == 10
    whole = as_arrays(data.Feed(cifar, 100, 0).training().take(3))
    assert same(as_arrays(data.Feed(cifar, 100, 0).training(2).take(1)), whole[2:])
    held_out = {
        x.tobytes() for x, _ in as_arrays(cifar.validation.dataset.map(cifar.preprocess_eval))
    }
    trained_on = {x.tobytes() for x, _ in as_arrays(cifar.train.dataset.map(cifar.preprocess_eval))}
    assert not held_out & trained_on


def test_imagenet_as_mocked(tmp_path):
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=12):
        imagenet = data.load("imagenet2012", data_dir=str(tmp_path), image_size=64)
        assert imagenet.num_outputs == 1000
        assert imagenet.shuffle_buffer < 10_000  # photographs: memory
        stream = data.Feed(imagenet, 4, 0).training()
        whole = as_arrays(stream.take(5))
        resumed = as_arrays(data.Feed(imagenet, 4, 0).training(4).take(1))
        evaluated = as_arrays(data.Feed(imagenet, 8).evaluation(imagenet.validation))
    assert whole[0][0].shape == (4, 64, 64, 3)
    assert same(resumed, whole[4:])
    assert [x.shape[0] for x, _ in evaluated] == [8, 4]
    assert -1 <= whole[0][0].min() < whole[0][0].max() <= 1


# --------------------------------------------------------------------------------- damaged data


@pytest.fixture
def folder(tmp_path):
    """train/{cat,dog} with 12 images each, one of them truncated."""
    for name in ("cat", "dog"):
        place = tmp_path / "train" / name
        place.mkdir(parents=True)
        for index in range(12):
            Image.fromarray(random_image(40, 48, seed=index)).save(place / f"{index:02}.jpg")
    bad = tmp_path / "train" / "dog" / "03.jpg"
    bad.write_bytes(bad.read_bytes()[:400])
    return tmp_path


def test_truncated_image_is_refused_by_name(folder):
    with pytest.raises(DataError, match=r"dog.03\.jpg.*truncated.*--on-bad-data skip"):
        data.load("image_folder", data_dir=str(folder), image_size=32)


def test_truncated_image_is_skipped_and_reported(folder, capsys):
    loaded = data.load("image_folder", data_dir=str(folder), image_size=32, on_bad_data="skip")
    printed = capsys.readouterr().err
    assert "03.jpg" in printed
    assert "1 bad entry" in printed
    assert loaded.train.size + loaded.validation.size + loaded.test.size == 23
    assert loaded.num_outputs == 2
    images = [x for x, _ in as_arrays(data.Feed(loaded, 4, 0).training().take(6))]
    assert all(np.isfinite(image).all() for image in images)


def saved(path, image, tail=b"", **options):
    image.save(path, **options)
    with path.open("ab") as file:
        file.write(tail)


def gradient():
    """A picture with many colours, none of them grey."""
    x = np.linspace(0, 200, 50 * 40).reshape(40, 50).astype(np.uint8)
    return Image.fromarray(np.stack([x + 50, x // 2, 255 - x], axis=-1))


AS_BMP = {
    "24 bits": (gradient(), b""),
    "palette": (gradient().convert("P"), b""),
    "palette of one colour": (Image.new("RGB", (50, 40), (255, 0, 0)).convert("P"), b""),
    "grey palette": (gradient().convert("L"), b""),
    "black and white": (gradient().convert("1"), b""),
    "32 bits": (gradient().convert("RGBA"), b""),
    "a byte behind it": (gradient(), b"\0"),
}
OTHERS = {
    "palette": (gradient().convert("P"), "png"),
    "transparent": (gradient().convert("RGBA"), "png"),
    "grey": (gradient().convert("L"), "png"),
    "black and white": (gradient().convert("1"), "png"),
    "gif": (gradient(), "gif"),
    "jpeg": (gradient(), "jpg"),
    "grey jpeg": (gradient().convert("L"), "jpg"),
}


@pytest.mark.parametrize("kind", [*AS_BMP, *(f"no BMP, {kind}" for kind in OTHERS)])
def test_an_image_that_passes_is_trained_on_as_it_looks(kind, tmp_path):
    """By every way in which training decodes; what does not pass says why."""
    if kind in AS_BMP:
        image, tail = AS_BMP[kind]
        path = tmp_path / "a.bmp"
        saved(path, image, tail)
    else:
        image, ending = OTHERS[kind.removeprefix("no BMP, ")]
        path = tmp_path / f"a.{ending}"
        saved(path, image)
    problem = image_problem(path)
    passes = kind not in AS_BMP or kind in ("24 bits", "32 bits", "grey palette")
    assert (problem is None) == passes, problem
    if problem is not None:
        assert "TensorFlow" in problem and "{{" not in problem and "[Op" not in problem
        return
    looks = np.asarray(Image.open(path).convert("RGB")).astype(float)
    seen = images.decode_eval(tf.io.read_file(str(path)), 40, "shift").numpy()
    np.testing.assert_allclose(seen.mean((0, 1)), looks.mean((0, 1)), atol=4)


def test_a_jpeg_with_a_second_image_behind_it_is_the_first(tmp_path):
    """As some cameras write it."""
    path = tmp_path / "a.jpg"
    gradient().save(path, "MPO", save_all=True, append_images=[gradient().rotate(90)])
    assert Image.open(path).format == "MPO"
    assert image_problem(path) is None
    seen = images.decode(tf.io.read_file(str(path))).numpy().astype(float)
    assert np.abs(seen - np.asarray(gradient(), float)).mean() < 4


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "PNG"])
def test_damaged_images_that_pass_can_be_trained_on(kind, tmp_path):
    """Flipped bytes, cuts and insertions: the check and every decoder of training agree."""
    whole = io.BytesIO()
    gradient().save(whole, kind)
    rng = np.random.default_rng(len(kind))
    path, passed = tmp_path / "damaged", 0
    for i in range(60):
        damaged = bytearray(whole.getvalue())
        place = int(rng.integers(len(damaged)))
        if i % 3 == 0:
            damaged[place] ^= int(rng.integers(1, 256))
        elif i % 3 == 1:
            del damaged[place:]
        else:
            damaged[place:place] = rng.bytes(9)
        path.write_bytes(damaged)
        if image_problem(path) is not None:
            continue
        passed += 1
        file = tf.io.read_file(str(path))
        images.decode_eval(file, 8, "imagenet")
        images.decode_train(file, tf.constant([1, i], tf.int64), 8, "imagenet", flip=False)
        images.decode_train(file, tf.constant([1, i], tf.int64), 8, "shift", flip=False)
    assert passed < 60


def image_folder(root, sizes):
    """root/PART/{cat,dog}, so many images of each class, no two alike."""
    for number, (part, size) in enumerate(sizes.items()):
        for name in ("cat", "dog"):
            place = root / part / name
            place.mkdir(parents=True)
            for i in range(size):
                seed = 1000 * number + 100 * (name == "dog") + i
                Image.fromarray(random_image(8, 8, seed)).save(place / f"{i:03}.png")
    return root


@pytest.mark.parametrize(
    ("parts", "sizes", "note"),
    [
        ({"train": 20}, (32, 4, 4), "validation and test: held out of train/"),
        ({"train": 20, "test": 3}, (36, 4, 6), "validation: held out of train/"),
        ({"train": 20, "val": 3}, (36, 6, 4), "test: held out of train/"),
        ({"train": 20, "validation": 3, "test": 2}, (40, 6, 4), ""),
    ],
)
def test_the_parts_of_an_image_folder_share_nothing(parts, sizes, note, tmp_path):
    root = str(image_folder(tmp_path, parts))
    loaded = data.load("image_folder", data_dir=root, image_size=32)
    splits = (loaded.train, loaded.validation, loaded.test)
    assert tuple(split.size for split in splits) == sizes
    assert loaded.note == note
    files = [{path.numpy() for path, _, _ in split.dataset} for split in splits]
    assert len(files[0] | files[1] | files[2]) == sum(sizes)
    for split in splits:
        assert len(set(Counter(int(label) for _, label, _ in split.dataset).values())) == 1
    again = data.load("image_folder", data_dir=root, image_size=32)
    paths = [[path.numpy() for path, _, _ in d.test.dataset] for d in (loaded, again)]
    assert paths[0] == paths[1]


@pytest.mark.parametrize("place", [None, "absent"])
def test_image_folder_must_exist(place, tmp_path):
    with pytest.raises(DataError, match="data-dir"):
        data.load("image_folder", data_dir=place and str(tmp_path / place))


def test_class_folders_alone_are_split_in_three(tmp_path, capsys):
    """Keras's layout, with what an operating system and a user leave between the images."""
    names = ("rote Äpfel", "test", "train")
    for number, name in enumerate(names):
        place = tmp_path / name
        place.mkdir()
        for i in range(10):
            image = Image.fromarray(random_image(8 + i, 12, 100 * number + i))
            image.save(place / f"photo {i}.{('PNG', 'jpg', 'JPEG')[i % 3]}")
        (place / ".DS_Store").write_bytes(b"\0")
        (place / "._photo 0.png").write_bytes(b"\0")
        (place / "notes.txt").write_text("a text")
    (tmp_path / ".cache" / "old").mkdir(parents=True)
    Image.fromarray(random_image(8, 8)).save(tmp_path / "train" / "z.webp")
    loaded = data.load("image_folder", data_dir=str(tmp_path), image_size=32)
    assert loaded.class_names == names
    assert (loaded.train.size, loaded.validation.size, loaded.test.size) == (24, 3, 3)
    assert loaded.note == f"validation and test: held out of {tmp_path.name}/"
    warnings = capsys.readouterr().err
    assert f"{tmp_path}: 1 .webp left out" in warnings
    assert f"{tmp_path}: test, train read as classes, since they hold no folders" in warnings
    assert [x.shape for x, _ in as_arrays(data.Feed(loaded, 8).evaluation(loaded.test))] == [
        (3, 32, 32, 3)
    ]


def test_the_first_batches_of_an_evaluation_have_every_class(tmp_path):
    root = str(image_folder(tmp_path, {"train": 20, "validation": 20, "test": 20}))
    loaded = data.load("image_folder", data_dir=root, image_size=32)
    for split in (loaded.validation, loaded.test):
        labels = [int(label) for _, label, _ in split.dataset]
        assert set(labels[:8]) == {0, 1} and sum(labels) == 20
    assert loaded.shuffle_buffer >= loaded.train.size  # the files are sorted by class


def test_a_folder_that_is_no_split_is_warned_of(tmp_path, capsys):
    sizes = {"train": 20, "valid": 2, "val": 2, "validation": 2}
    root = image_folder(tmp_path, sizes)
    data.load("image_folder", data_dir=str(root), image_size=32)
    assert f"warning: {root}: not read: val, valid; the splits are" in capsys.readouterr().err


@pytest.mark.parametrize("size, sizes", [(3, None), (4, (4, 2, 2)), (9, (14, 2, 2))])
def test_few_images_of_a_class_are_in_all_parts(size, sizes, tmp_path):
    root = str(image_folder(tmp_path, {"train": size}))
    if sizes is None:
        with pytest.raises(DataError, match="no images for the test split: add some, four of a"):
            data.load("image_folder", data_dir=root)
        return
    loaded = data.load("image_folder", data_dir=root, image_size=32)
    assert (loaded.train.size, loaded.validation.size, loaded.test.size) == sizes
    for split in (loaded.train, loaded.validation, loaded.test):
        assert {int(label) for _, label, _ in split.dataset} == {0, 1}


@pytest.mark.parametrize("augment", ["none", "imagenet"])
def test_images_are_turned_as_exif_says(augment, tmp_path):
    """Training, with and without crops, and evaluation see the image as a viewer shows it."""
    x, y = np.meshgrid(np.linspace(0, 255, 48), np.linspace(0, 255, 32))
    image = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    shown = []
    for orientation in range(1, 9):
        folder = tmp_path / str(orientation)
        folder.mkdir()
        tags = image.getexif()
        tags[0x0112] = orientation
        for i, ending in enumerate(("jpg", "png") * 2):
            image.save(folder / f"{i}.{ending}", exif=tags)
        upright = ImageOps.exif_transpose(Image.open(folder / "1.png"))
        shown.append(np.asarray(upright.resize((16, 16)), np.float32) / 127.5 - 1)
    loaded = data.load("image_folder", str(tmp_path), image_size=16, augment=augment, flip=False)
    feed = data.Feed(loaded, 16)
    batches = [*feed.training().take(1), *feed.evaluation(loaded.test)]
    assert [len(y) for _, y in batches] == [16, 8]
    for seen, label in (
        example for x, y in as_arrays(batches) for example in zip(x, y, strict=True)
    ):
        if augment == "none":
            np.testing.assert_allclose(seen, shown[label], atol=0.15)
        # A crop has the same slopes, whatever its place.
        for axis in (0, 1):
            slopes, own = (np.diff(p, axis=axis).mean((0, 1)) for p in (seen, shown[label]))
            assert np.array_equal(np.sign(slopes.round(2)), np.sign(own.round(2)))
