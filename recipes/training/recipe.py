"""Recipes (network, data and settings of a run), and their results."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.errors import RecipeError
from recipes.training import options as opts
from recipes.training.options import Option, Options

if TYPE_CHECKING:  # --help need not wait for TensorFlow
    from recipes.data import Data


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The network, data and settings of a run.

    Attributes:
        name: str, also the folder under `runs/`.
        network: str, a name of `recipes.models.build`.
        description: str, the head of `--help`; usually the module's docstring.
        settings: values of any options (`recipes.training.options`): epochs, learning_rate ...
        network_options: options of `recipes.models.build`, such as batch_norm_momentum.
        build: None, or `(num_outputs, image_size, model_class, options) -> keras.Model` in place
            of `recipes.models.build`. `model_class(inputs, outputs)` makes the model.
        load_data: None, or `options -> recipes.data.Data` in place of `recipes.data.load`.
        loss: None (cross-entropy of class probabilities), or `options -> keras.losses.Loss`.
        metrics: None (accuracy), or `() -> list of keras.metrics.Metric`.
        monitor: the validation metric that chooses the best model, with its `val_`.
        mode: "max" or "min".
        report: None, or `Result -> list of (name, text)` rows for the closing table. Recipes that
            are not classifiers print no `Best accuracy` line.
        extra_options: `recipes.training.options.Option`s of this recipe alone.
    """

    name: str
    network: str = "resnet50"
    description: str = ""
    settings: Mapping[str, object] = dataclasses.field(default_factory=dict)
    network_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    build: Callable[..., Any] | None = None
    load_data: Callable[..., Data] | None = None
    loss: Callable[..., Any] | None = None
    metrics: Callable[[], list[Any]] | None = None
    monitor: str = "val_accuracy"
    mode: str = "max"
    report: Callable[[Result], list[tuple[str, str]]] | None = None
    extra_options: tuple[Option, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]{1,100}", self.name) or self.name.startswith("."):
            raise RecipeError(
                f"the recipe's name {self.name[:60]!r} cannot be that of a folder under runs/: use "
                "letters, digits, '_', '-' and '.'"
            )

    @property
    def test_metric(self) -> str:
        """The `monitor` of the test split, such as `test_accuracy`."""
        return "test_" + self.monitor.removeprefix("val_")

    def kept_epoch(self, rule: str, history: Sequence[Mapping[str, Any]]) -> int | None:
        """The index of the epoch whose model is kept; None if none is.

        Args:
            rule: "improve", the epoch that is best by `monitor`; "last"; or "beats-test", the last
                that is better by it than by the same metric on the test split.
            history: a dict per epoch, as in `history.csv`.
        """
        sign = {"max": 1.0, "min": -1.0}[self.mode]
        scores = [sign * row[self.monitor] for row in history]
        places = [i for i, score in enumerate(scores) if math.isfinite(score)]
        if rule == "improve":
            return max(places, key=scores.__getitem__, default=None)
        if rule == "beats-test":
            places = [i for i in places if scores[i] > sign * history[i][self.test_metric]]
        return places[-1] if places else None

    def options(self, **values: object) -> Options:
        """The recipe's options with `values` in place of its settings, checked.

        Raises:
            RecipeError: an unknown name or a value that cannot be.
        """
        return opts.resolve(self, {}, values)


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        recipe: str, its name.
        output: Path, the folder of the results.
        monitor: str, the metric that chose the best model.
        best: float, its value for the model that was kept (of the best epoch if none was).
        best_epoch: int, its place in `history`, from 0.
        kept: bool, whether `best.keras` was written.
        history: a dict per epoch, numbers as in `history.csv`.
        test: metrics of the kept model on the test split.
        parameters: int, of the network that was kept.
        clip_fraction: float, mean over the epochs, in 0..1; NaN without telemetry.
        seconds: float, from start to end, earlier processes of a resumed run included.
        data: the `recipes.data.Data`.
    """

    recipe: str
    output: Path
    monitor: str
    best: float
    best_epoch: int
    kept: bool
    history: Sequence[dict[str, Any]]
    test: Mapping[str, float]
    parameters: int
    clip_fraction: float
    seconds: float
    data: Data


def at_chance(accuracy: float, guess: float) -> bool:
    """Whether a classifier's accuracy is about that of guessing, `guess`; so is a NaN.

    A classifier that learned something reaches twice that, or closes a tenth of the gap to 1 if
    that is less.
    """
    return not accuracy >= min(2 * guess, guess + 0.1 * (1 - guess))
