"""The list of recipes."""

import importlib
from typing import TYPE_CHECKING

from recipes.errors import RecipeError

if TYPE_CHECKING:
    from recipes.training import Recipe

# Recipe name: module and variable.
RECIPES = {
    "alexnet": ("recipes.alexnet", "RECIPE"),
    "vgg16": ("recipes.vgg16", "RECIPE"),
    "vgg19": ("recipes.vgg19", "RECIPE"),
    "googlenet": ("recipes.googlenet", "RECIPE"),
    "inception_v2": ("recipes.inception_v2", "RECIPE"),
    "resnet50": ("recipes.resnet50", "RECIPE"),
    "driving_resnet50": ("recipes.driving_resnet50", "RECIPE"),
    "driving_pilotnet": ("recipes.driving_pilotnet", "RECIPE"),
    "driving_resnet50_signs": ("recipes.driving_resnet50", "SIGNS"),
}


def find_recipe(name: str) -> "Recipe":
    """The `Recipe` with a name in `RECIPES`.

    Raises:
        RecipeError: no such recipe.
    """
    if name not in RECIPES:
        raise RecipeError(f"{name!r} is not a recipe: choose from {', '.join(RECIPES)}")
    module, attribute = RECIPES[name]
    return getattr(importlib.import_module(module), attribute)


def script_of(name: str) -> str:
    """The script of a recipe in `RECIPES`, relative to the parent of recipes/."""
    return RECIPES[name][0].replace(".", "/") + ".py"
