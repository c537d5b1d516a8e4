"""VGG-19, no batch normalisation, under per-layer gradient clipping.

python recipes/vgg19.py
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: the folder above recipes/ holds its packages
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recipes.training import Recipe, main

RECIPE = Recipe(
    name="vgg19",
    network="vgg19",
    description=__doc__,
    network_options={"pool_grid": 1, "dense_units": 512, "dropout": 0.0},
    # The paper's optimizer; its learning rate is 0.01.
    settings={
        "image_size": 32,
        "epochs": 5,
        "batch_size": 32,
        "optimizer": "sgd",
        "momentum": 0.9,
        "learning_rate": 0.02,
        "warmup_epochs": 1.0,
        "weight_decay": 5e-4,
        "clipper": "norm",
        "max_norm": 1.0,
    },
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
