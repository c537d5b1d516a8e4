"""The results of a search: its trials, its verdict, and the files and the table that show them.

The verdict: the best clipped and the best unclipped trial, each at its own learning rate, are
trained again with seeds that were not used to choose them. An exact rank test (Mann and Whitney,
1947; a diverged run ranks last, ties count half) gives the probability that scores differ this
much by chance.
"""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from rich.console import Console
from scipy.stats import PermutationMethod, mannwhitneyu

import keras_gradclip as kgc
from keras_gradclip.files import replace_file, write_json
from keras_gradclip.tuning.divergence import DIVERGED
from keras_gradclip.tuning.oracles import BASELINE, CONFIRMS
from keras_gradclip.tuning.space import to_clipper
from recipes.training.recipe import at_chance
from recipes.words import show_table

#: A p-value below this counts as significant.
SIGNIFICANCE = 0.05
#: Fewest runs per trial that can reach significance: 2 of the C(8, 4) = 70 orders are as extreme.
LEAST_RUNS = 4
_ORDERS = 200_000  # exact up to ten runs a side, else a random sample of this many orders
_STATUSES = ("completed", "diverged", "failed", "running")
_MEANS = ("chance", "clip_fraction", "grad_norm", "epochs", "seconds")

# --------------------------------------------------------------------------------------- the trials


@dataclass(frozen=True)
class TrialRow:
    """One trial.

    Attributes:
        trial: str, its id.
        status: "completed", "diverged" (in one of its runs), "failed" or "running".
        values: the active hyper-parameters by name.
        score: float, the mean score of its runs; NaN if there is none.
        scores: floats, one per run; infinite for a diverged run.
        baseline: whether this is the unclipped trial of the default values.
        confirms: id of the trial that this one repeats with other seeds, or "".
        chance: float, the objective of random guessing; NaN if unknown.
        message: str, why it failed.
        clip_fraction, grad_norm, epochs, seconds: floats, means over its runs.
    """

    trial: str
    status: str
    values: Mapping[str, Any]
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
        """The number of finished runs."""
        return len(self.scores)

    @property
    def lowest(self) -> float:
        """The lowest score of its runs."""
        return min(self.scores, default=math.nan)

    @property
    def highest(self) -> float:
        """The highest score of its runs."""
        return max(self.scores, default=math.nan)


def trial_rows(oracle) -> list[TrialRow]:
    """The trials of a `SearchOracle`, ranked."""
    rows = []
    for trial_id, trial in oracle.trials.items():
        values, metrics = trial.hyperparameters.values, trial.metrics
        means = {name: float(metrics.get_last_value(name)) for name in metrics.metrics}
        score = math.nan if trial.score is None else float(trial.score)
        status = trial.status.lower() if trial.status in ("COMPLETED", "FAILED") else "running"
        if status == "completed" and (means.get(DIVERGED) or not math.isfinite(score)):
            status = "diverged"
        row = TrialRow(
            trial=trial_id,
            status=status,
            values=own_values(values),
            score=score,
            scores=_scores(metrics, oracle.objective.name),
            baseline=BASELINE in values,
            confirms=values.get(CONFIRMS, ""),
            message=trial.message or "",
            **{name: means[name] for name in _MEANS if name in means},
        )
        rows.append(row)
    return ranked(rows, oracle.objective.direction)


def _scores(metrics, objective: str) -> tuple[float, ...]:
    """The score of each run; KerasTuner stores them as one observation with several values."""
    old = [f"run-{i}" for i in range(len(metrics.metrics)) if metrics.exists(f"run-{i}")]
    if old:  # a search of an older version has one metric per run
        return tuple(float(metrics.get_last_value(name)) for name in old)
    history = metrics.get_history(objective) if metrics.exists(objective) else []
    return tuple(float(value) for observation in history for value in observation.value)


def own_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters of a trial without KerasTuner's own entries."""
    return {name: value for name, value in values.items() if not name.startswith("tuner/")}


def ranked(rows: Sequence[TrialRow], direction: str) -> list[TrialRow]:
    """The rows sorted by status, confirming trials first, then best score first."""
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
    """The best completed trial; confirming trials come before all others."""
    return next((row for row in rows if row.status == "completed"), None)


def contest(rows: Sequence[TrialRow]) -> tuple[TrialRow | None, TrialRow | None]:
    """The clipped and the unclipped trial that the verdict compares.

    Of each kind the confirming trial, else the best; if all of a kind diverged, the first.
    """
    ended = [row for row in rows if row.status in ("completed", "diverged")]
    ended.sort(key=lambda row: not row.confirms)  # stable: keeps the best first
    clipped = next((row for row in ended if row.clipped), None)
    return clipped, next((row for row in ended if not row.clipped), None)


def describe(values: Mapping[str, Any]) -> str:
    """A trial's hyper-parameters on one line, without those that are "none"."""
    kind = values.get("clipper", "?")
    parts = ["no clipping" if kind == "none" else kind]
    for name, value in values.items():
        if name not in ("clipper", "activation_gate") and value != "none":
            text = f"{value:.3g}" if isinstance(value, float) else str(value)
            parts.append(f"{name.removeprefix(f'{kind}/')}={text}")
    return " ".join(parts)


def formatter(metric: str) -> Callable[[float], str]:
    """A function that formats a metric: accuracies in per cent, others to four digits."""
    return lambda value: f"{100 * value:.2f} %" if "accuracy" in metric else f"{value:.4g}"


# -------------------------------------------------------------------------------------- the verdict


@dataclass(frozen=True)
class Verdict:
    """The answer of a search.

    Attributes:
        effect: what clipping did: "helps" and "harms" are significant, "not shown" is not;
            "not tested": too few runs, or no model that learned.
        text: the answer in one or two sentences.
        p_value: float, of the rank test; NaN if not tested.
        learned: False if the best trial is no better than guessing.
    """

    effect: Literal["helps", "harms", "not shown", "not tested"]
    text: str
    p_value: float = math.nan
    learned: bool = True


def rank_test(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p-value of the exact rank test; 1 for fewer than two runs a side."""
    if min(len(a), len(b)) < 2:
        return 1.0
    method = PermutationMethod(n_resamples=_ORDERS, rng=np.random.default_rng(0))
    return float(mannwhitneyu(a, b, method=method).pvalue)


def verdict(rows: Sequence[TrialRow], objective) -> Verdict:
    """The answer of a search, from its `ranked` rows."""
    best = best_row(rows)
    if best is None:
        text = "No trial ended: see the errors above."
        if any(row.status == "diverged" for row in rows):
            text = "No trial ended well: lower the learning rates (--learning-rate-range)."
        return Verdict("not tested", text)
    clipped, unclipped = contest(rows)
    show = formatter(objective.name)
    choice = f"Use {describe(best.values)}" if best.clipped else "Do not clip"
    guess = f"The best guess: {choice}."
    if clipped is None or unclipped is None:
        missing = "clipped" if clipped is None else "unclipped"
        return Verdict("not tested", f"Not tested: no {missing} trial ended. {guess}")
    scores = f"{_runs(clipped, show)} clipped, {_runs(unclipped, show)} unclipped"
    if objective.direction == "max" and best.chance > 0 and at_chance(best.score, best.chance):
        text = f"No model learned: {scores}, where guessing gives {show(best.chance)}. Train longer"
        return Verdict("not tested", f"{text} (--epochs, --limit-steps).", learned=False)
    runs = min(clipped.runs, unclipped.runs)
    if not (clipped.confirms and unclipped.confirms and runs >= LEAST_RUNS):
        remedy = f"--confirm-runs {LEAST_RUNS} or more tests it with other seeds"
        return Verdict("not tested", f"Not tested: {scores}; {remedy}. {guess}")
    p_value = rank_test(clipped.scores, unclipped.scores)
    scores += f" (rank test over seeds: p = {p_value:.2g})"
    pairs = [np.sign(x - y) for x in clipped.scores for y in unclipped.scores if x != y]
    helps = sum(pairs) > 0 if objective.direction == "max" else sum(pairs) < 0
    if p_value >= SIGNIFICANCE or helps != best.clipped:  # or means and ranks disagree
        return Verdict("not shown", f"Clipping is not shown to matter: {scores}. {guess}", p_value)
    if helps:
        return Verdict("helps", f"{choice}. It matters: {scores}.", p_value)
    return Verdict("harms", f"{choice}. Clipping harms: {scores}.", p_value)


def _runs(row: TrialRow, show: Callable[[float], str]) -> str:
    """The mean of a trial's runs and their range, or how many of them diverged."""
    diverged = sum(not math.isfinite(score) for score in row.scores)
    if diverged or row.status == "diverged":
        return f"{diverged or 1} of {max(row.runs, 1)} runs diverged"
    if row.runs < 2:
        return show(row.score)
    return f"{show(row.score)} ({show(row.lowest)} to {show(row.highest)})"


# ---------------------------------------------------------------------------------------- the files

_FIELDS = (
    *("trial", "status", "baseline", "confirms", "score", "lowest", "highest", "runs", "scores"),
    *("clip_fraction", "grad_norm", "epochs", "seconds"),
)


def write_trials(rows: Sequence[TrialRow], path: Path) -> None:
    """Writes `trials.csv`: one row per trial, best first; unused hyper-parameters stay empty."""
    names = sorted({name for row in rows for name in row.values})
    lines = [{**{name: getattr(row, name) for name in _FIELDS}, **row.values} for row in rows]
    table = pd.DataFrame(lines, columns=[*_FIELDS, *names], dtype=object)
    table["scores"] = [" ".join(f"{score:.7g}" for score in row.scores) for row in rows]
    table.index += 1
    replace_file(path, lambda scratch: table.to_csv(scratch, index_label="rank"))


def write_best(
    rows: Sequence[TrialRow], path: Path, objective, groups, recipe: str
) -> dict[str, Any] | None:
    """Writes `best.json`: the best trial's clipper, for a recipe's `--clip-config`.

    If not clipping was best, the clipper is a ClipMap that clips nothing.

    Returns:
        The content; None, with no file written, if no trial completed.
    """
    best = best_row(rows)
    if best is None:
        return None
    answer = verdict(rows, objective)
    content = {
        "recipe": recipe,
        "objective": objective.name,
        "score": best.score,
        "trial": best.trial,
        "values": dict(best.values),
        "verdict": {
            "effect": answer.effect,
            "p_value": None if math.isnan(answer.p_value) else answer.p_value,
            "text": answer.text,
        },
        "clipper": kgc.serialize(to_clipper(best.values, groups) or kgc.ClipMap({".*": None})),
    }
    write_json(path, content)
    return content


def write_hparams(rows: Sequence[TrialRow], folder: Path, objective) -> None:
    """Writes one TensorBoard HParams run per finished trial; existing ones are kept.

    `folder` gets one subfolder per trial: its values, score, clip fraction and gradient norm.
    """
    import tensorflow as tf
    from tensorboard.plugins.hparams import api

    for row in rows:
        target = folder / row.trial
        if row.status == "running" or target.exists():
            continue
        partial = folder.parent / "tensorboard.partial"  # a kill leaves no partial run
        shutil.rmtree(partial, ignore_errors=True)
        writer = tf.summary.create_file_writer(str(partial))
        with writer.as_default(step=0):
            api.hparams(dict(row.values), trial_id=row.trial)
            figures = {objective.name: row.score}
            figures |= {"clip_fraction": row.clip_fraction, "grad_norm": row.grad_norm}
            for name, value in figures.items():
                if math.isfinite(value):
                    tf.summary.scalar(name, value)
        writer.close()
        folder.mkdir(exist_ok=True)
        partial.rename(target)


def print_table(rows: Sequence[TrialRow], objective, title: str, console: Console) -> None:
    """Prints the ranked trials; confirming trials come first and have no rank."""
    show, lines, rank = formatter(objective.name), [], 0
    for row in rows:
        rank += not row.confirms
        label = describe(row.values) + (" (baseline)" if row.baseline else "")
        if row.confirms:
            label += f" (trial {row.confirms} with other seeds)"
        done = row.status == "completed"
        line = {
            "settings": label,
            "rank": "" if row.confirms else str(rank),
            objective.name: show(row.score) if done else row.status,
            "runs from .. to": "",
            "clipped": "" if math.isnan(row.clip_fraction) else f"{100 * row.clip_fraction:.3g} %",
            "time": "" if math.isnan(row.seconds) else f"{row.seconds:.0f} s",
            "trial": row.trial,
        }
        if done and row.runs > 1:
            line["runs from .. to"] = f"{show(row.lowest)} .. {show(row.highest)}"
        lines.append(line)
    show_table(pd.DataFrame(lines), title, console)
