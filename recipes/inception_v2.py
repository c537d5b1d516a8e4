"""Inception-v2 under per-layer gradient clipping.

python recipes/inception_v2.py
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: the folder above recipes/ holds its packages
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recipes.training import Recipe, main

RECIPE = Recipe(
    name="inception_v2",
    network="inception_v2",
    description=__doc__,
    network_options={"batch_norm_momentum": 0.9},
    settings={
        "image_size": 32,
        "epochs": 6,
        "batch_size": 64,
        "learning_rate": 1e-3,
        "warmup_epochs": 1.0,
        "weight_decay": 1e-4,
        "clipper": "absolute",
        "threshold": 0.1,
    },
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
