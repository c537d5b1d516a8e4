"""Which threshold to use, and whether it matters: one sentence from one test.

The best clipped and the best unclipped trial, each at its own learning rate, are trained again
with seeds that had no part in choosing them. An exact rank test (Mann and Whitney, 1947; a run
that diverged ranks last, ties count half) says how often chance alone would set the scores of the
two so far apart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import PermutationMethod, mannwhitneyu

from recipes.training.recipe import at_chance
from tuning.rows import TrialRow, best_row, contest, describe, formatter

#: It matters where chance alone would do it less often than this.
SIGNIFICANCE = 0.05
#: The fewest runs a trial whose ranks can show it: 2 of the C(8, 4) = 70 orders are so extreme.
LEAST_RUNS = 4
_ORDERS = 200_000  # of two times ten runs are all tried; of more, so many at random

Effect = Literal["helps", "harms", "not shown", "not tested"]


@dataclass(frozen=True)
class Verdict:
    """The answer of a search.

    Attributes:
        effect: what clipping did: "helps" and "harms" are significant, "not shown" is not,
            "not tested": too few runs, or no model that learned.
        text: the answer in one or two sentences.
        p_value: float, of the test; NaN where there was none.
    """

    effect: Effect
    text: str
    p_value: float = math.nan


def rank_test(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p-value of the exact rank test; 1 for fewer than two runs a side."""
    if min(len(a), len(b)) < 2:
        return 1.0
    method = PermutationMethod(n_resamples=_ORDERS, rng=np.random.default_rng(0))
    return float(mannwhitneyu(a, b, method=method).pvalue)


def verdict(rows: Sequence[TrialRow], objective) -> Verdict:
    """The answer of a search.

    Args:
        rows: as `tuning.rows.ranked` orders them.
        objective: with `name` and `direction`.
    """
    best = best_row(rows)
    if best is None:
        if any(row.status == "diverged" for row in rows):
            remedy = "lower the learning rates (--learning-rate-range)"
            return Verdict("not tested", f"No trial ended well: {remedy}.")
        return Verdict("not tested", "No trial ended: see the errors above.")
    clipped, unclipped = contest(rows)
    show = formatter(objective.name)
    guess = f"The best guess: {_choice(best)}."
    if clipped is None or unclipped is None:
        missing = "clipped" if clipped is None else "unclipped"
        text = f"Not tested: no {missing} trial ended. {guess}"
        return Verdict("not tested", text)
    scores = f"{_runs(clipped, show)} clipped, {_runs(unclipped, show)} unclipped"
    if _at_chance(best, objective):
        text = f"No model learned: {scores}, where guessing gives {show(best.chance)}. Train longer"
        return Verdict("not tested", f"{text} (--epochs, --limit-steps).")
    runs = min(clipped.runs, unclipped.runs)
    if not (clipped.confirms and unclipped.confirms and runs >= LEAST_RUNS):
        remedy = f"--confirm-runs {LEAST_RUNS} or more tests it with other seeds"
        return Verdict("not tested", f"Not tested: {scores}; {remedy}. {guess}")
    p_value = rank_test(clipped.scores, unclipped.scores)
    scores += f" (rank test over seeds: p = {p_value:.2g})"
    helps = _ranks_better(clipped, unclipped, objective)
    if p_value >= SIGNIFICANCE or helps != best.clipped:  # or means and ranks disagree
        text = f"That clipping matters is not shown: {scores}. {guess}"
        return Verdict("not shown", text, p_value)
    if helps:
        return Verdict("helps", f"{_choice(best)}. It matters: {scores}.", p_value)
    return Verdict("harms", f"{_choice(best)}. Clipping harms: {scores}.", p_value)


def _choice(best: TrialRow) -> str:
    return f"Use {describe(best.values)}" if best.clipped else "Do not clip"


def _ranks_better(a: TrialRow, b: TrialRow, objective) -> bool:
    sign = 1 if objective.direction == "max" else -1
    pairs = [np.sign(sign * (x - y)) for x in a.scores for y in b.scores if x != y]
    return sum(pairs) > 0


def _at_chance(best: TrialRow, objective) -> bool:
    """Whether even the best trial is about as good as a guess; only accuracies tell."""
    if math.isnan(best.chance) or objective.direction != "max":
        return False
    return at_chance(best.score, best.chance)


def _runs(row: TrialRow, show) -> str:
    """The mean of a trial's runs and their range, or how many of them diverged."""
    diverged = sum(not math.isfinite(score) for score in row.scores)
    if diverged or row.status == "diverged":
        return f"{diverged or 1} of {max(row.runs, 1)} runs diverged"
    if row.runs < 2:
        return show(row.score)
    return f"{show(row.score)} ({show(row.lowest)} to {show(row.highest)})"
