"""VGG-16, without batch normalisation, under a bound of each unit's step.

Command: `python recipes/vgg16.py`

Trains on the 5,000 embedded MNIST digits at 32x32, with 1x1 pooling and dense layers of 512 (15.2
million parameters): 160 seconds of processor time, 0.6 times ResNet-50's, on two CPU cores shared
with other work. Reached here, best validation accuracy with seeds 0, 1, 2: 95.4, 95.2 and 95.8 %;
at ten times this learning rate, 0.2: 94.6, 95.4 and 93.2 %. Without the clip (`--clipper none`):
80.4 %, chance and 76.4 %, and at 0.2 chance (seed 0). `--clipper norm` has 94.2, 96.6 and
95.4 %, and at 0.2 it stays at chance (seed 0). From `python recipes/tools/compare.py vgg16
--learning-rates 0.02 0.2 --clippers recipe none norm`.
"""

import sys

try:
    from recipes.training import Recipe, main
except ModuleNotFoundError as error:
    sys.exit(f"error: no module {error.name}: run `make venv`, then .venv/bin/python (README.md)")

RECIPE = Recipe(
    name="vgg16",
    network="vgg16",
    description=__doc__,
    # Dropout of 0.5 drowns the little by which images differ in so deep an untrained network:
    # VGG-19 spent the whole of such a run at chance.
    network_options={"pool_grid": 1, "dense_units": 512, "dropout": 0.0},
    # SGD with momentum as in the paper, at twice its learning rate.
    settings={
        "image_size": 32,
        "epochs": 3,
        "batch_size": 32,
        "optimizer": "sgd",
        "momentum": 0.9,
        "learning_rate": 0.02,
        "warmup_epochs": 0.6,  # a fifth of the run
        "weight_decay": 5e-4,
        "clipper": "update_ratio",
        "max_ratio": 1e-3,  # half of the default: it is twice as deep as AlexNet
        "biases": "unit",
        "anneal": "learning_rate",
    },
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
