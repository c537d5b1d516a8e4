"""VGG-19, without batch normalisation, under a bound of each unit's step.

Command: `python recipes/vgg19.py`

Trains on the 5,000 embedded MNIST digits at 32x32, with 1x1 pooling and dense layers of 512 (20.6
million parameters): 325 seconds of processor time, 1.1 times ResNet-50's, on two CPU cores shared
with other work. Reached here: 96.2 % validation and 96.2 % test accuracy (seed 0); at ten times
this learning rate, 0.2: 94.4 and 96.2 %. Without the clip (`--clipper none`): 87.0 and 85.0 %; with
`--clipper norm`: 95.4 and 96.6 %. One run each.
"""

import dataclasses
import sys

try:
    from recipes import vgg16
    from recipes.training import main
except ModuleNotFoundError as error:
    sys.exit(f"error: no module {error.name}: run `make venv`, then .venv/bin/python (README.md)")

# VGG-16's settings, two epochs longer.
RECIPE = dataclasses.replace(
    vgg16.RECIPE,
    name="vgg19",
    network="vgg19",
    description=__doc__,
    settings={**vgg16.RECIPE.settings, "epochs": 5, "warmup_epochs": 1.0},
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
