"""Training of a recipe: options, folder, and the run itself."""

from recipes.training.recipe import Recipe, Result
from recipes.training.run import main, run

__all__ = ["Recipe", "Result", "main", "run"]
