"""How does a run work? A recipe, its options, its folder, and the training itself."""

from recipes.training.session import Recipe, Result, main, prepared, run

__all__ = ["Recipe", "Result", "main", "prepared", "run"]
