"""AlexNet, without batch normalisation, under a bound of each unit's step.

Command: `python recipes/alexnet.py`

Trains on the 5,000 embedded MNIST digits at 32x32, with 2x2 pooling and dense layers of 1024 (4.6
million parameters): 60 seconds of processor time, 0.2 times ResNet-50's, on two CPU cores shared
with other work. Reached here, best validation accuracy with seeds 0, 1, 2: 95.6, 95.0 and 94.0 %;
at ten times this learning rate, 0.5, it is 95.8, 94.8 and 94.6 %. Without the clip (`--clipper
none`): 81.4, 92.4 and 72.2 %, and at 0.5 it diverges (seed 0). `--clipper norm` has 94.0, 95.2 and
95.0 %, and at 0.5 it stays at chance (seed 0). From `python recipes/tools/compare.py alexnet
--learning-rates 0.05 0.5 --clippers recipe none norm`.
"""

import sys

try:
    from recipes.training import Recipe, main
except ModuleNotFoundError as error:
    sys.exit(f"error: no module {error.name}: run `make venv`, then .venv/bin/python (README.md)")

RECIPE = Recipe(
    name="alexnet",
    network="alexnet",
    description=__doc__,
    network_options={"pool_grid": 2, "dense_units": 1024},
    # SGD with momentum as in the paper, at five times its learning rate.
    settings={
        "image_size": 32,
        "epochs": 3,
        "batch_size": 64,
        "optimizer": "sgd",
        "momentum": 0.9,
        "learning_rate": 0.05,
        "warmup_epochs": 0.6,  # a fifth of the run
        "weight_decay": 5e-4,
        "clipper": "update_ratio",
        "biases": "unit",
        "anneal": "learning_rate",
    },
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
