"""The networks against the tables of their papers, by hand-written expectations."""

import math
import warnings
import zipfile

import keras
import numpy as np
import pytest
from helpers import shapes_only

import keras_gradclip as kgc
from recipes import models
from recipes.models.layers import AdaptiveAveragePooling2D, LocalResponseNormalization

NAMES = ["alexnet", "vgg16", "vgg19", "googlenet", "inception_v2", "resnet50"]


def build_unallocated(name, *args, **kwargs):
    with shapes_only():
        return models.build(name, *args, **kwargs)


@pytest.fixture(scope="module")
def full_size():
    """Every network at 224 pixels and 1000 classes, without memory for its weights."""
    return {name: build_unallocated(name) for name in NAMES}


def count(variables):
    return sum(math.prod(v.shape) for v in variables)


def convolutions(model):
    """[name, kernel, stride, filters, side of the output] of each convolution, in graph order."""
    return [
        (
            layer.name,
            layer.kernel_size[0],
            layer.strides[0],
            layer.filters,
            layer.output.shape[1],
        )
        for layer in model.layers
        if isinstance(layer, keras.layers.Conv2D)
    ]


def output_shape(model, layer):
    return tuple(model.get_layer(layer).output.shape[1:])


def test_the_list_of_networks():
    assert list(models.NETWORKS) == NAMES


@pytest.mark.parametrize(
    ("name", "total", "trainable"),
    [
        ("alexnet", 61_100_840, 61_100_840),
        ("vgg16", 138_357_544, 138_357_544),
        ("vgg19", 143_667_240, 143_667_240),
        ("googlenet", 13_378_280, 13_378_280),
        ("inception_v2", 11_214_888, 11_194_984),
        ("resnet50", 25_636_712, 25_583_592),
    ],
)
def test_golden_parameter_counts(full_size, name, total, trainable):
    model = full_size[name]
    assert count(model.weights) == model.count_params() == total
    assert count(model.trainable_weights) == trainable
    shapes = [tuple(o.shape) for o in model.outputs]
    assert shapes == [(None, 1000)] * (3 if name == "googlenet" else 1)
    assert tuple(model.inputs[0].shape) == (None, 224, 224, 3)
    assert {o.dtype for o in model.outputs} == {"float32"}
    # The head has one name, so that one rule of a ClipMap serves all networks.
    assert model.get_layer("predictions").kernel.shape[1] == 1000


def test_googlenet_without_its_auxiliary_heads():
    model = build_unallocated("googlenet", aux_heads=False)
    assert model.count_params() == 6_998_552
    assert model.output_shape == (None, 1000)
    assert not [layer.name for layer in model.layers if layer.name.startswith("aux")]


def test_alexnet_against_the_table(full_size):
    # Krizhevsky 2014, one tower: the side after each convolution at 224 pixels.
    assert convolutions(full_size["alexnet"]) == [
        ("conv1", 11, 4, 64, 55),
        ("conv2", 5, 1, 192, 27),
        ("conv3", 3, 1, 384, 13),
        ("conv4", 3, 1, 256, 13),
        ("conv5", 3, 1, 256, 13),
    ]
    sides = {"pool1": 27, "pool2": 13, "pool5": 6, "avg_pool": 6}
    for layer, side in sides.items():
        assert output_shape(full_size["alexnet"], layer)[:2] == (side, side), layer
    kernels = [
        tuple(full_size["alexnet"].get_layer(n).kernel.shape) for n in ("fc6", "fc7", "predictions")
    ]
    assert kernels == [(9216, 4096), (4096, 4096), (4096, 1000)]


@pytest.mark.parametrize(
    ("name", "repeats"), [("vgg16", [2, 2, 3, 3, 3]), ("vgg19", [2, 2, 4, 4, 4])]
)
def test_vgg_against_the_table(full_size, name, repeats):
    # Simonyan and Zisserman, table 1, columns D and E: 3x3 throughout, halved after each block.
    expected = [
        (f"block{block}_conv{i}", 3, 1, filters, side)
        for block, (filters, side, n) in enumerate(
            zip([64, 128, 256, 512, 512], [224, 112, 56, 28, 14], repeats, strict=True), start=1
        )
        for i in range(1, n + 1)
    ]
    model = full_size[name]
    assert convolutions(model) == expected
    assert output_shape(model, "block5_pool") == (7, 7, 512)
    kernels = [tuple(model.get_layer(n).kernel.shape) for n in ("fc1", "fc2", "predictions")]
    assert kernels == [(25088, 4096), (4096, 4096), (4096, 1000)]


# Szegedy et al. 2015, table 1: side, channels out, and the six widths of each module.
GOOGLENET = {
    "3a": (28, 256, [64, 96, 128, 16, 32, 32]),
    "3b": (28, 480, [128, 128, 192, 32, 96, 64]),
    "4a": (14, 512, [192, 96, 208, 16, 48, 64]),
    "4b": (14, 512, [160, 112, 224, 24, 64, 64]),
    "4c": (14, 512, [128, 128, 256, 24, 64, 64]),
    "4d": (14, 528, [112, 144, 288, 32, 64, 64]),
    "4e": (14, 832, [256, 160, 320, 32, 128, 128]),
    "5a": (7, 832, [256, 160, 320, 32, 128, 128]),
    "5b": (7, 1024, [384, 192, 384, 48, 128, 128]),
}


def test_googlenet_against_the_table(full_size):
    model = full_size["googlenet"]
    expected = {
        "conv1_7x7": (7, 2, 64, 112),
        "conv2_3x3_reduce": (1, 1, 64, 56),
        "conv2_3x3": (3, 1, 192, 56),
        "aux1_conv": (1, 1, 128, 4),
        "aux2_conv": (1, 1, 128, 4),
    }
    branches = ["1x1", "3x3_reduce", "3x3", "5x5_reduce", "5x5", "pool_proj"]
    for module, (side, channels, widths) in GOOGLENET.items():
        assert output_shape(model, f"inception_{module}_output") == (side, side, channels)
        for branch, kernel, width in zip(branches, [1, 1, 3, 1, 5, 1], widths, strict=True):
            expected[f"inception_{module}_{branch}"] = (kernel, 1, width, side)
    assert {name: tuple(rest) for name, *rest in convolutions(model)} == expected
    pools = {"pool1": 56, "pool2": 28, "pool3": 14, "pool4": 7}
    for layer, side in pools.items():
        pool = model.get_layer(layer)
        assert (pool.pool_size, pool.strides) == ((3, 3), (2, 2))
        assert output_shape(model, layer)[0] == side
    assert model.get_layer("dropout").rate == 0.4
    for head in ("aux1", "aux2"):
        pool = model.get_layer(f"{head}_pool")
        assert (pool.pool_size, pool.strides, pool.padding) == ((5, 5), (3, 3), "valid")
        assert tuple(model.get_layer(f"{head}_fc").kernel.shape) == (2048, 1024)
        assert model.get_layer(f"{head}_dropout").rate == 0.7
    assert model.get_layer("aux1_pool").input is model.get_layer("inception_4a_output").output
    assert model.get_layer("aux2_pool").input is model.get_layer("inception_4d_output").output


# Ioffe and Szegedy 2015, figure 5: side, channels out, stride, and 1x1, 3x3 reduce, 3x3, double
# reduce, double 3x3, pool projection (0: none).
INCEPTION_V2 = {
    "3a": (28, 256, 1, [64, 64, 64, 64, 96, 32], "Average"),
    "3b": (28, 320, 1, [64, 64, 96, 64, 96, 64], "Average"),
    "3c": (14, 576, 2, [0, 128, 160, 64, 96, 0], "Max"),
    "4a": (14, 576, 1, [224, 64, 96, 96, 128, 128], "Average"),
    "4b": (14, 576, 1, [192, 96, 128, 96, 128, 128], "Average"),
    "4c": (14, 576, 1, [160, 128, 160, 128, 160, 96], "Average"),
    "4d": (14, 576, 1, [96, 128, 192, 160, 192, 96], "Average"),
    "4e": (7, 1024, 2, [0, 128, 192, 192, 256, 0], "Max"),
    "5a": (7, 1024, 1, [352, 192, 320, 160, 224, 128], "Average"),
    "5b": (7, 1024, 1, [352, 192, 320, 192, 224, 128], "Max"),
}


def test_inception_v2_against_the_table(full_size):
    model = full_size["inception_v2"]
    expected = {
        "conv1_7x7": (7, 2, 64, 112),
        "conv2_3x3_reduce": (1, 1, 64, 56),
        "conv2_3x3": (3, 1, 192, 56),
    }
    side_in = 28
    for module, (side, channels, stride, widths, pool) in INCEPTION_V2.items():
        prefix = f"inception_{module}"
        assert output_shape(model, f"{prefix}_output") == (side, side, channels)
        one, reduce3, three, reduce_double, double, project = widths
        if one:
            expected[f"{prefix}_1x1"] = (1, 1, one, side)
        side_in = side * stride
        expected[f"{prefix}_3x3_reduce"] = (1, 1, reduce3, side_in)
        expected[f"{prefix}_3x3"] = (3, stride, three, side)
        expected[f"{prefix}_double3x3_reduce"] = (1, 1, reduce_double, side_in)
        expected[f"{prefix}_double3x3a"] = (3, 1, double, side_in)
        expected[f"{prefix}_double3x3b"] = (3, stride, double, side)
        if project:
            expected[f"{prefix}_pool_proj"] = (1, 1, project, side)
        layer = model.get_layer(f"{prefix}_pool")
        assert type(layer).__name__ == f"{pool}Pooling2D"
        assert (layer.pool_size, layer.strides) == ((3, 3), (stride, stride))
    assert {name: tuple(rest) for name, *rest in convolutions(model)} == expected
    for name in expected:
        assert not model.get_layer(name).use_bias
        norm = model.get_layer(f"{name}_bn")
        assert norm.center and norm.scale
        assert norm.input is model.get_layer(name).output


def test_resnet50_against_the_table(full_size):
    model = full_size["resnet50"]
    # He et al. 2016, table 1: blocks, side and width of the bottlenecks of each stage.
    expected = {"conv1_conv": (7, 2, 64, 112)}
    for stage, (blocks, side, width) in enumerate(
        [(3, 56, 64), (4, 28, 128), (6, 14, 256), (3, 7, 512)], start=2
    ):
        for block in range(1, blocks + 1):
            prefix = f"conv{stage}_block{block}"
            stride = 2 if block == 1 and stage > 2 else 1
            if block == 1:
                expected[f"{prefix}_0_conv"] = (1, stride, 4 * width, side)
            expected[f"{prefix}_1_conv"] = (1, stride, width, side)
            expected[f"{prefix}_2_conv"] = (3, 1, width, side)
            expected[f"{prefix}_3_conv"] = (1, 1, 4 * width, side)
    assert {name: tuple(rest) for name, *rest in convolutions(model)} == expected
    assert tuple(model.get_layer("predictions").kernel.shape) == (2048, 1000)


@pytest.mark.parametrize("name", ["vgg16", "vgg19", "resnet50"])
def test_equals_keras_applications(full_size, name):
    application = {
        "vgg16": keras.applications.VGG16,
        "vgg19": keras.applications.VGG19,
        "resnet50": keras.applications.ResNet50,
    }[name]
    with shapes_only():
        reference = application(weights=None)
    # Same variables in the same order: pretrained weight files load.
    assert [v.shape for v in full_size[name].weights] == [v.shape for v in reference.weights]
    assert [v.path for v in full_size[name].weights] == [v.path for v in reference.weights]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("image_size", [32, 64])
def test_small_images_keep_a_map(name, image_size):
    options = {"dense_units": 64} if name in ("alexnet", "vgg16", "vgg19") else {}
    model = build_unallocated(name, 10, image_size, channels=1, **options)
    for layer in model.layers:
        assert 0 not in layer.output.shape, layer.name
    assert tuple(model.outputs[0].shape) == (None, 10)


@pytest.mark.parametrize("name", ["alexnet", "vgg16", "googlenet"])
def test_dense_shapes_do_not_depend_on_the_image_size(full_size, name):
    small = build_unallocated(name, 1000, 32)
    assert [v.shape for v in small.weights] == [v.shape for v in full_size[name].weights]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("alexnet", {"dense_units": 32, "pool_grid": 2}),
        pytest.param("vgg16", {"dense_units": 32, "pool_grid": 1}, marks=pytest.mark.slow),
        ("googlenet", {}),
        pytest.param("inception_v2", {}, marks=pytest.mark.slow),
        pytest.param("resnet50", {}, marks=pytest.mark.slow),
    ],
)
def test_forward_pass_gives_probabilities(name, options):
    model = models.build(name, 10, 32, **options)
    images = np.random.default_rng(0).uniform(-1, 1, (3, 32, 32, 3)).astype("float32")
    probabilities = model.predict(images, verbose=0)  # in a graph, as training runs
    assert probabilities.shape == (3, 10) and probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    assert np.ptp(probabilities, axis=0).max() > 0  # the images matter


@pytest.mark.parametrize("name", NAMES)
def test_mixed_precision_ends_in_float32(name):
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = build_unallocated(name, 10, 32)
    finally:
        keras.config.set_dtype_policy(policy)
    assert {o.dtype for o in model.outputs} == {"float32"}
    heads = [la for la in model.layers if la.name.endswith("predictions")]
    others = [la for la in model.layers if isinstance(la, keras.layers.Conv2D)]
    assert {la.compute_dtype for la in heads} == {"float32"}
    assert {la.compute_dtype for la in others} == {"float16"}


def test_model_class_wraps_the_same_graph():
    class Own(keras.Model):
        pass

    own = build_unallocated("alexnet", 10, 32, model_class=Own)
    plain = build_unallocated("alexnet", 10, 32)
    assert isinstance(own, Own)
    assert [v.path for v in own.weights] == [v.path for v in plain.weights]
    assert own.name == "alexnet"


def test_batch_norm_momentum_reaches_every_layer():
    for name in ("resnet50", "inception_v2"):
        model = build_unallocated(name, 10, 32, batch_norm_momentum=0.8)
        norms = [la for la in model.layers if isinstance(la, keras.layers.BatchNormalization)]
        assert len(norms) > 50 and {la.momentum for la in norms} == {0.8}
        assert {la.get_config()["momentum"] for la in norms} == {0.8}


def test_initializer_reaches_every_hidden_kernel():
    for name in ("alexnet", "vgg16", "googlenet", "inception_v2"):
        model = build_unallocated(name, 10, 32, initializer="he_uniform")
        kernels = [la for la in model.layers if hasattr(la, "kernel_initializer")]
        hidden = [la for la in kernels if not la.name.endswith("predictions")]
        assert {type(la.kernel_initializer).__name__ for la in hidden} == {"HeUniform"}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: models.build("resnet51"), ["resnet51", "resnet50"]),
        (lambda: models.build("resnet50", stem_stride=2), ["stem_stride"]),
        (lambda: models.build("vgg16", depth=19), ["depth"]),
        (lambda: models.build("vgg16", image_size=28), ["image_size=28", "32"]),
        (lambda: models.build("alexnet", image_size=32, stem_stride=4), ["stem_stride=4"]),
        (lambda: models.build("resnet50", batch_norm_momentum=1.0), ["batch_norm_momentum=1.0"]),
        (lambda: LocalResponseNormalization(size=4), ["size=4"]),
        (lambda: models.build("vgg16", pool_grid=0), ["grid=0"]),
    ],
)
def test_errors_name_the_argument_and_the_remedy(call, words):
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    for word in words:
        assert word in str(error.value)


def test_local_response_normalization_against_numpy():
    x = np.random.default_rng(1).normal(0, 20, (2, 3, 3, 7)).astype("float32")
    expected = np.empty(x.shape)
    for i in range(7):
        window = x[..., max(0, i - 2) : i + 3].astype("float64")
        expected[..., i] = x[..., i] / (1 + 1e-4 / 5 * (window**2).sum(-1)) ** 0.75
    layer = LocalResponseNormalization()
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5)
    half = LocalResponseNormalization(dtype="float16")(x * 20)  # squares beyond float16
    assert np.isfinite(keras.ops.convert_to_numpy(half)).all()
    assert LocalResponseNormalization.from_config(layer.get_config()).get_config() == (
        layer.get_config()
    )


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (6, 6), (7, 13), (14, 12)])
@pytest.mark.parametrize("grid", [1, 4, 6])
def test_adaptive_pooling_against_numpy(size, grid):
    x = np.random.default_rng(4).normal(size=(2, *size, 3)).astype("float32")
    expected = np.empty((2, grid, grid, 3))
    for i in range(grid):
        for j in range(grid):
            rows = slice(i * size[0] // grid, math.ceil((i + 1) * size[0] / grid))
            columns = slice(j * size[1] // grid, math.ceil((j + 1) * size[1] / grid))
            expected[:, i, j] = x[:, rows, columns].astype("float64").mean((1, 2))
    layer = AdaptiveAveragePooling2D(grid)
    inputs = keras.Input((*size, 3))
    model = keras.Model(inputs, layer(inputs))  # predict runs in a graph, as training does
    assert model.output_shape == (None, grid, grid, 3)
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=1e-5, atol=1e-6)
    assert AdaptiveAveragePooling2D.from_config(layer.get_config()).grid == grid


def tiny_heads(model_class=keras.Model):
    """Three heads as GoogLeNet has, small enough to train in a test."""
    x = keras.Input((4,))
    outputs = [
        keras.layers.Dense(3, activation="softmax", name=name)(x)
        for name in ("predictions", "a", "b")
    ]
    return models.auxiliary_model_class(model_class)(x, outputs)


@pytest.mark.parametrize(
    "loss", ["sparse_categorical_crossentropy", keras.losses.SparseCategoricalCrossentropy()]
)
def test_auxiliary_losses_weigh_three_tenths_in_training_only(loss):
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(8, 4)).astype("float32"), rng.integers(0, 3, 8)
    model = tiny_heads()
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss=loss, metrics=["accuracy"])

    def crossentropy(head):
        p = keras.ops.convert_to_numpy(model.get_layer(head)(x)).astype("float64")
        return -np.log(p[np.arange(8), y]).mean()

    main, a, b = (crossentropy(head) for head in ("predictions", "a", "b"))
    history = model.fit(x, y, batch_size=8, epochs=1, validation_data=(x, y), verbose=0).history
    assert set(history) == {"accuracy", "loss", "val_accuracy", "val_loss"}
    np.testing.assert_allclose(history["loss"], main + 0.3 * (a + b), rtol=1e-5)
    np.testing.assert_allclose(history["val_loss"], main, rtol=1e-5)
    np.testing.assert_allclose(model.evaluate(x, y, verbose=0)[0], main, rtol=1e-5)
    probabilities = model.predict(x, verbose=0)
    np.testing.assert_allclose(probabilities, model.get_layer("predictions")(x), rtol=1e-5)
    accuracy = (probabilities.argmax(1) == y).mean()
    np.testing.assert_allclose(history["val_accuracy"], accuracy, rtol=1e-6)
    np.testing.assert_allclose(history["accuracy"], accuracy, rtol=1e-6)


def test_auxiliary_gradients_are_of_the_mean_loss():
    x, y = np.eye(4, dtype="float32"), np.array([0, 1, 2, 0])
    model = tiny_heads()
    before = {v.path: v.numpy() for v in model.trainable_variables}
    model.compile(optimizer=keras.optimizers.SGD(1.0), loss="sparse_categorical_crossentropy")
    predictions = {
        head: model.get_layer(head)(x).numpy().astype("float64")
        for head in ("predictions", "a", "b")
    }
    model.fit(x, y, batch_size=4, epochs=1, verbose=0)
    for head, weight in [("predictions", 1), ("a", 0.3), ("b", 0.3)]:
        # d(mean crossentropy)/d(bias) of a softmax: the mean of p - onehot(y).
        step = weight * (predictions[head] - np.eye(3)[y]).mean(0)
        bias = model.get_layer(head).bias
        np.testing.assert_allclose(bias.numpy(), before[bias.path] - step, rtol=1e-4, atol=1e-7)


def test_auxiliary_heads_train_with_clipping():
    x, y = np.eye(4, dtype="float32"), np.array([0, 1, 2, 0])
    model = tiny_heads(kgc.ClippedModel)
    assert isinstance(model, kgc.ClippedModel)
    before = {v.path: v.numpy() for v in model.trainable_variables}
    model.compile(
        optimizer=keras.optimizers.SGD(1.0),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        clipper=kgc.AbsoluteClip(1e-4),
    )
    history = model.fit(x, y, batch_size=4, validation_data=(x, y), verbose=0).history
    assert history["clip_fraction"][0] > 0.5 and history["grad_norm"][0] > 1e-4
    assert {"accuracy", "val_accuracy"} <= set(history)
    for v in model.trainable_variables:  # the heads' gradients are clipped as the trunk's
        step = np.abs(v.numpy() - before[v.path])
        assert 0.9e-4 < step.max() < 1.01e-4, v.path


def test_inference_model_drops_the_heads():
    model = models.build("googlenet", 10, 32)
    deployed = models.inference_model(model)
    images = np.random.default_rng(3).normal(size=(2, 32, 32, 3)).astype("float32")
    assert type(deployed) is type(models.build("googlenet", 10, 32, aux_heads=False))
    assert deployed.output_shape == (None, 10)
    assert deployed.count_params() < model.count_params()
    assert not [v.path for v in deployed.weights if "aux" in v.path]
    np.testing.assert_array_equal(deployed(images), model(images, training=False))


def test_a_saved_model_with_heads_loads_and_predicts_the_same(tmp_path):
    x, y = np.eye(4, dtype="float32"), np.array([0, 1, 2, 0])
    model = tiny_heads()
    model.compile(optimizer="sgd", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "heads.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = keras.models.load_model(tmp_path / "heads.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    assert loaded.evaluate(x, y, verbose=0) == model.evaluate(x, y, verbose=0)
    first = loaded.fit(x, y, verbose=0, shuffle=False).history["loss"]
    assert first == model.fit(x, y, verbose=0, shuffle=False).history["loss"]


def test_a_deployed_model_needs_no_layer_of_this_package(tmp_path):
    inputs = keras.Input((10, 10, 3))
    x = keras.layers.Conv2D(8, 3, name="conv", activation="relu")(inputs)
    x = LocalResponseNormalization(name="norm", alpha=5.0)(x)
    x = AdaptiveAveragePooling2D(3, name="pool")(x)
    outputs = keras.layers.Dense(4, "softmax", name="predictions")(keras.layers.Flatten()(x))
    model = keras.Model(inputs, outputs)
    deployed = models.inference_model(model)
    assert [v.path for v in deployed.weights] == [v.path for v in model.weights]
    assert deployed.weights[0] is model.weights[0]
    deployed.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as file:
        assert b"recipes" not in file.read("config.json")
    images = np.random.default_rng(0).random((5, 10, 10, 3), dtype="float32")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(images), model(images))
