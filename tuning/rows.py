"""The trials of a search as rows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: The folder of the trials inside that of a search.
PROJECT = "trials"
_STATUSES = ("completed", "diverged", "failed", "running")


@dataclass(frozen=True)
class TrialRow:
    """One trial.

    Attributes:
        trial: str, its id.
        status: "completed", "diverged" (in one of its runs), "failed" or "running".
        values: the hyper-parameters by name, those that are not in use left out.
        score: float, the mean of its runs' scores; NaN without one.
        scores: floats, one a run; infinite for a run that diverged.
        baseline: whether it is the trial of the default values, unclipped.
        confirms: id of the trial that this one repeats with other seeds, or "".
        chance: float, the objective of a model that guesses; NaN where unknown.
        message: str, why it failed.
        clip_fraction, grad_norm, epochs, seconds: floats, means over its runs.
    """

    trial: str
    status: str
    values: Mapping
    score: float = math.nan
    scores: tuple[float, ...] = ()
    baseline: bool = False
    confirms: str = ""
    chance: float = math.nan
    message: str = ""
    clip_fraction: float = math.nan
    grad_norm: float = math.nan
    epochs: float = math.nan
    seconds: float = math.nan

    @property
    def clipped(self) -> bool:
        """Whether the trial has a clipper."""
        return self.values.get("clipper", "none") != "none"

    @property
    def runs(self) -> int:
        """The number of its runs that have ended."""
        return len(self.scores)

    @property
    def lowest(self) -> float:
        """The lowest score of its runs."""
        return min(self.scores, default=math.nan)

    @property
    def highest(self) -> float:
        """The highest score of its runs."""
        return max(self.scores, default=math.nan)


def ranked(rows: Sequence[TrialRow], direction: str) -> list[TrialRow]:
    """By status; those that confirm before the others; best first."""
    sign = -1 if direction == "max" else 1
    return sorted(
        rows,
        key=lambda row: (
            _STATUSES.index(row.status),
            not row.confirms,
            sign * row.score if row.status == "completed" else 0,
            row.trial,
        ),
    )


def best_row(rows: Sequence[TrialRow]) -> TrialRow | None:
    """The best completed trial: of those that were confirmed, if any was."""
    return next((row for row in rows if row.status == "completed"), None)


def best_of_each(rows: Sequence[TrialRow]) -> tuple[TrialRow | None, TrialRow | None]:
    """The best clipped and the best unclipped of ranked rows: the first of each that ended.

    Where all trials of a kind diverged, the first of these.
    """
    ended = [row for row in rows if row.status in ("completed", "diverged")]

    def first(clipped):
        return next((row for row in ended if row.clipped == clipped), None)

    return first(True), first(False)


def contest(rows: Sequence[TrialRow]) -> tuple[TrialRow | None, TrialRow | None]:
    """The clipped and the unclipped trial that the verdict compares, confirmed if they were."""
    # Stable: the best stay in front.
    return best_of_each(sorted(rows, key=lambda row: not row.confirms))


def describe(values: Mapping) -> str:
    """A trial's hyper-parameters in a line."""
    kind = values.get("clipper", "?")
    if kind == "none":
        parts = ["no clipping"]
    else:
        parts = [kind]
        parts += [
            f"{name.partition('/')[2]}={_short(value)}"
            for name, value in values.items()
            if name.startswith(f"{kind}/") and value != "none"
        ]
    if values.get("activation_gate"):
        parts.append(f"gate c={_short(values['gate/clip_value'])} γ={_short(values['gate/gamma'])}")
    if "learning_rate" in values:
        parts.append(f"learning_rate={_short(values['learning_rate'])}")
    others = [
        f"{name}={_short(value)}"
        for name, value in values.items()
        if "/" not in name and name not in ("clipper", "activation_gate", "learning_rate")
    ]
    return " ".join([*parts, *others])


def formatter(metric: str):
    """How to print a metric: accuracies in per cent, others to four digits."""

    def show(value):
        if "accuracy" in metric:
            return f"{100 * value:.2f} %"
        return f"{value:.4g}"

    return show


def _short(value) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.3g}"
