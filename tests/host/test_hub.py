"""keras-hub's backbones from their configurations: with the clip out of reach, as without one."""

import keras
import numpy as np
import pytest
from test_networks import assert_equal, far_clipped_sgd, trained

hub = pytest.importorskip("keras_hub", reason="keras-hub is in the environment of make host-tests")
pytestmark = pytest.mark.slow

TEXT = {
    "vocabulary_size": 30,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 16,
    "dropout": 0.0,
    "max_sequence_length": 6,
}
BACKBONES = {
    "ResNet": {
        "input_conv_filters": [64],
        "input_conv_kernel_sizes": [3],
        "stackwise_num_filters": [64, 64],
        "stackwise_num_blocks": [1, 1],
        "stackwise_num_strides": [1, 2],
        "block_type": "basic_block",
        "image_shape": (16, 16, 3),
    },
    "MiT": {
        "layerwise_depths": [1, 1],
        "num_layers": 2,
        "layerwise_num_heads": [1, 2],
        "layerwise_sr_ratios": [2, 1],
        "max_drop_path_rate": 0.0,
        "layerwise_patch_sizes": [3, 3],
        "layerwise_strides": [2, 2],
        "image_shape": (16, 16, 3),
        "hidden_dims": [8, 16],
    },
    "ViT": {
        "image_shape": (16, 16, 3),
        "patch_size": (4, 4),
        "num_layers": 2,
        "num_heads": 2,
        "hidden_dim": 8,
        "mlp_dim": 16,
    },
    "Bert": TEXT,
    "GPT2": TEXT,
}


def inputs_of(name):
    rng = np.random.default_rng(0)
    if BACKBONES[name] is not TEXT:
        return rng.uniform(0, 1, (8, 16, 16, 3)).astype("float32")
    x = {"token_ids": rng.integers(0, 30, (8, 6)), "padding_mask": np.ones((8, 6), "int32")}
    if name == "Bert":
        x["segment_ids"] = np.zeros((8, 6), "int32")
    return x


def features_of(backbone):
    outputs = backbone.output
    outputs = outputs["sequence_output"] if isinstance(outputs, dict) else outputs
    pool = keras.layers.GlobalAveragePooling2D if len(outputs.shape) == 4 else first_token
    return pool()(outputs)


def first_token():
    return keras.layers.Lambda(lambda x: x[:, 0])


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone(name):
    results = []
    for make in (keras.optimizers.SGD, far_clipped_sgd):
        keras.utils.set_random_seed(0)
        backbone = getattr(hub.models, f"{name}Backbone")(**BACKBONES[name])
        head = keras.layers.Dense(3, "softmax")
        model = keras.Model(backbone.input, head(features_of(backbone)))
        model.compile(make(0.01), "sparse_categorical_crossentropy")
        results.append(trained(model, inputs_of(name), np.arange(8) % 3))
    assert_equal(*results)
