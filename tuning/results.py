"""What a search found: a table, `trials.csv`, `best.json`, and the answer in one sentence."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import keras_gradclip as kgc
from recipes.callbacks import read_rows
from recipes.options import replace_file, write_json
from tuning.oracles import BASELINE, DIVERGED
from tuning.space import threshold_of, to_clipper

_MEASURED = ("lowest", "highest", "runs", "clip_fraction", "grad_norm", "epochs", "seconds")


def trial_rows(oracle) -> list[dict]:
    """A dict a trial, best first, then those that diverged, failed, or are not done.

    Keys: trial, status ("completed", "diverged", "failed", "running"), baseline, score, lowest
    and highest (over the trial's runs), runs, clip_fraction, grad_norm, epochs, seconds, and
    values (the hyper-parameters by name).
    """
    rows = []
    for trial_id, trial in oracle.trials.items():
        values = trial.hyperparameters.values

        def metric(name, trial=trial):
            if not trial.metrics.exists(name):
                return math.nan
            return float(trial.metrics.get_last_value(name))

        status = {"COMPLETED": "completed", "FAILED": "failed"}.get(trial.status, "running")
        score = math.nan if trial.score is None else float(trial.score)
        if status == "completed" and (metric(DIVERGED) > 0 or not math.isfinite(score)):
            status = "diverged"
        rows.append(
            {
                "trial": trial_id,
                "status": status,
                "baseline": BASELINE in values,
                "score": score,
                **{name: metric(name) for name in _MEASURED},
                "values": {k: v for k, v in values.items() if not k.startswith("tuner/")},
            }
        )
    order = ("completed", "diverged", "failed", "running")
    sign = -1 if oracle.objective.direction == "max" else 1
    return sorted(
        rows,
        key=lambda row: (
            order.index(row["status"]),
            sign * row["score"] if row["status"] == "completed" else 0,
            row["trial"],
        ),
    )


def write_csv(rows: Sequence[Mapping], path: Path) -> None:
    """`trials.csv`: a line a trial, best first, a column a hyper-parameter; empty: not in use."""
    names = sorted({name for row in rows for name in row["values"]})
    fields = ["rank", "trial", "status", "baseline", "score", *_MEASURED, *names]

    def write(scratch):
        with open(scratch, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fields, restval="")
            writer.writeheader()
            for rank, row in enumerate(rows, 1):
                flat = {**row, **row["values"], "rank": rank}
                del flat["values"]
                writer.writerow({k: "" if _is_nan(v) else v for k, v in flat.items()})

    replace_file(path, write)


def write_best(rows: Sequence[Mapping], path: Path, objective, groups, recipe: str) -> dict | None:
    """`best.json`: the best trial's clipper, which recipes take with `--clip-config`.

    Where not clipping was best, the clipper is a ClipMap that leaves all variables alone.

    Returns:
        What was written; None, and nothing is, without a completed trial.
    """
    best = best_row(rows)
    if best is None:
        return None
    clipper = to_clipper(best["values"], groups) or kgc.ClipMap({".*": None})
    content = {
        "recipe": recipe,
        "objective": objective.name,
        "score": best["score"],
        "trial": best["trial"],
        "values": best["values"],
        "clipper": kgc.serialize(clipper),
    }
    write_json(path, content)
    return content


def best_row(rows: Sequence[Mapping]) -> Mapping | None:
    """The best completed trial."""
    return next((row for row in rows if row["status"] == "completed"), None)


def verdict(rows: Sequence[Mapping], objective) -> str:
    """Which threshold to use, and whether it matters, in one or two sentences.

    The yardstick is the spread of the baseline's runs, which differ in nothing but the seed.
    """
    best = best_row(rows)
    if best is None:
        return "No trial ended well: lower the learning rates (--learning-rate-range)."
    clipped = [r for r in rows if r["status"] == "completed" and threshold_of(r["values"])]
    unclipped = [r for r in rows if r["status"] == "completed" and not threshold_of(r["values"])]
    show = formatter(objective.name)
    if not clipped:
        return f"Do not clip: no clipped trial ended well; unclipped, {show(best['score'])}."
    choice = f"Use {describe(clipped[0]['values'])}"
    if not unclipped:
        return f"{choice}: {show(clipped[0]['score'])}. It matters: unclipped training diverged."
    sign = 1 if objective.direction == "max" else -1
    gain = sign * (clipped[0]["score"] - unclipped[0]["score"])
    scores = f"{show(clipped[0]['score'])} clipped, {show(unclipped[0]['score'])} unclipped"
    spread = noise(rows)
    if spread is None:
        hint = "run the baseline more than once (--baseline-runs) to see what is chance"
        head = choice if gain > 0 else "Do not clip"
        return f"{head}: {scores}; {hint}."
    chance = f"the baseline's seeds alone differ by {show(spread, difference=True)}"
    if gain > spread:
        return f"{choice}. It matters: {scores}; {chance}."
    if gain >= -spread:
        return f"It hardly matters: {scores}; {chance}."
    return f"Do not clip: {scores}; {chance}."


def noise(rows: Sequence[Mapping]) -> float | None:
    """The spread of the baseline's runs; None without two runs that ended well."""
    for row in rows:
        if row["baseline"] and row["status"] == "completed" and row["runs"] > 1:
            return row["highest"] - row["lowest"]
    return None


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


def print_table(rows: Sequence[Mapping], objective, title: str, console) -> None:
    """The ranked trials."""
    from rich.table import Table

    show = formatter(objective.name)
    table = Table(title=title)
    for name in ("rank", objective.name, "runs from .. to", "clipped", "time", "trial", ""):
        table.add_column(name, justify="left" if not name else "right")
    for rank, row in enumerate(rows, 1):
        done = row["status"] == "completed"
        spread = ""
        if done and row["runs"] > 1:
            spread = f"{show(row['lowest'])} .. {show(row['highest'])}"
        label = describe(row["values"]) + (" (baseline)" if row["baseline"] else "")
        fraction = row["clip_fraction"]
        table.add_row(
            str(rank),
            show(row["score"]) if done else row["status"],
            spread,
            "" if math.isnan(fraction) else f"{100 * fraction:.3g} %",
            "" if math.isnan(row["seconds"]) else f"{row['seconds']:.0f} s",
            row["trial"],
            label,
            style="bold" if row["baseline"] else None,
        )
    console.print(table)


def curves(folder: Path, row: Mapping, metric: str) -> list[list[float]]:
    """The metric by epoch of each run of a trial, as far as its files are on this machine."""
    runs = sorted((folder / f"trial_{row['trial']}").glob("run-*/history.csv"))
    return [[line[metric] for line in read_rows(path) if metric in line] for path in runs]


def formatter(metric: str):
    """How to print a metric: accuracies in per cent, others to four digits."""

    def show(value, difference=False):
        if "accuracy" in metric:
            return f"{100 * value:.2f} {'points' if difference else '%'}"
        return f"{value:.4g}"

    return show


def _short(value) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.3g}"


def _is_nan(value) -> bool:
    return isinstance(value, float) and math.isnan(value)
