"""Errors that end a recipe in one clear line instead of a traceback."""


class RecipeError(Exception):
    """A mistake of the caller or of the surroundings: its message is all the user needs."""


class DataError(RecipeError):
    """A data set that is missing, misspelt, damaged or of the wrong kind."""


class TrainingDiverged(RecipeError):
    """The loss or the weights became NaN or infinite.

    Attributes:
        step: int, the zero-based step of the run at which it was seen.
        layer: str or None, the layer where the first non-finite gradient appeared.
    """

    def __init__(self, message: str, step: int, layer: str | None = None):
        super().__init__(message)
        self.step = step
        self.layer = layer
