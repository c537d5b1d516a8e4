"""Training of a recipe: options, folder, and the run itself."""

from recipes.training.quiet import import_tensorflow

import_tensorflow()  # before anything below imports it with all its noise

from recipes.training.recipe import Recipe, Result  # noqa: E402
from recipes.training.run import main, run  # noqa: E402

__all__ = ["Recipe", "Result", "main", "run"]
