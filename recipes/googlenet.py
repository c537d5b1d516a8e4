"""GoogLeNet, with its auxiliary heads, under per-layer gradient clipping.

python recipes/googlenet.py
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: the folder above recipes/ holds its packages
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recipes.training import Recipe, main

RECIPE = Recipe(
    name="googlenet",
    network="googlenet",
    description=__doc__,
    network_options={"initializer": "he_normal"},
    settings={
        "image_size": 32,
        "epochs": 10,
        "batch_size": 64,
        "learning_rate": 1e-3,
        "warmup_epochs": 1.0,
        "weight_decay": 1e-4,
        "clipper": "absolute",
        "threshold": 0.01,
    },
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
