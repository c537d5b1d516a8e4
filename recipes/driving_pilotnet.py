"""PilotNet steers a car under per-layer gradient clipping (Bojarski et al. 2016).

Command: `python recipes/driving_pilotnet.py`, or with a log of the Udacity simulator
`python recipes/driving_pilotnet.py --data-dir DRIVE`

The standard network for this task, trained like `driving_resnet50.py`: same log, split, loss, clip
and optimizer. docs/driving.md compares the errors of both.
"""

import dataclasses
import sys

try:
    from recipes import driving_resnet50
    from recipes.driving import steering
    from recipes.training import main
except ModuleNotFoundError as error:
    sys.exit(f"error: no module {error.name}: run `make venv`, then .venv/bin/python (README.md)")


def build(num_outputs, image_size, model_class, options):
    """PilotNet with one linear output, the angle."""
    from recipes.models.pilotnet import pilotnet

    return pilotnet(num_outputs, (image_size, options.image_width), model_class)


RECIPE = dataclasses.replace(
    driving_resnet50.RECIPE,
    name="driving_pilotnet",
    description=__doc__,
    build=build,
    settings={**steering.SETTINGS, "image_size": 66},
    extra_options=steering.options(image_width=200),
)


if __name__ == "__main__":
    sys.exit(main(RECIPE))
