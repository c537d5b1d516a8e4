"""What a search found: a table, `trials.csv`, `best.json`, and the answer in one sentence."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import keras_gradclip as kgc
from keras_gradclip.tuning.oracles import BASELINE, CONFIRMS, DIVERGED
from keras_gradclip.tuning.space import threshold_of, to_clipper
from recipes.training.callbacks import read_rows
from recipes.training.options import replace_file, write_json

_MEASURED = ("lowest", "highest", "runs", "clip_fraction", "grad_norm", "epochs", "seconds")


def trial_rows(oracle) -> list[dict]:
    """A dict a trial: those that confirm, the others best first, the diverged, failed and running.

    Keys: trial, status ("completed", "diverged", "failed", "running"), baseline, confirms (the id
    of the trial that this one repeats with other seeds, or ""), score, lowest
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
                "confirms": values.get(CONFIRMS, ""),
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
            not row["confirms"],
            sign * row["score"] if row["status"] == "completed" else 0,
            row["trial"],
        ),
    )


def write_csv(rows: Sequence[Mapping], path: Path) -> None:
    """`trials.csv`: a line a trial, best first, a column a hyper-parameter; empty: not in use."""
    names = sorted({name for row in rows for name in row["values"]})
    fields = ["rank", "trial", "status", "baseline", "confirms", "score", *_MEASURED, *names]

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
    """The best completed trial: of those that were confirmed, if any was."""
    return next((row for row in rows if row["status"] == "completed"), None)


def contest(rows: Sequence[Mapping]) -> tuple[Mapping | None, Mapping | None]:
    """The best clipped and the best unclipped trial, as they were confirmed if they were."""
    ended = [row for row in rows if row["status"] == "completed" or row["confirms"]]
    ended.sort(key=lambda row: not row["confirms"])  # stable: the best stay in front

    def first(clipped):
        return next((r for r in ended if bool(threshold_of(r["values"])) == clipped), None)

    return first(True), first(False)


def verdict(rows: Sequence[Mapping], objective) -> str:
    """Which threshold to use, and whether it matters, in one or two sentences.

    It matters where no run without clipping came up to one with it, over seeds that had no part
    in choosing the two trials.
    """
    if best_row(rows) is None:
        if any(row["status"] == "diverged" for row in rows):
            return "No trial ended well: lower the learning rates (--learning-rate-range)."
        return "No trial ended: see the errors above (--traceback shows more)."
    clipped, unclipped = contest(rows)
    show = formatter(objective.name)
    if clipped is None or clipped["status"] == "diverged":
        return f"Do not clip: unclipped, {_runs(unclipped, show)}; no clipped trial held up."
    choice = f"Use {describe(clipped['values'])}"
    if unclipped is None or unclipped["status"] == "diverged":
        score = _runs(clipped, show)
        return f"{choice}: {score}. It matters: without clipping, training diverged."
    sign = 1 if objective.direction == "max" else -1
    scores = f"{_runs(clipped, show)} clipped, {_runs(unclipped, show)} unclipped"
    helps = sign * (clipped["score"] - unclipped["score"]) > 0
    if not (clipped["confirms"] and unclipped["confirms"]):
        head = choice if helps else "Do not clip"
        return f"{head}: {scores}; not confirmed with other seeds (--confirm-runs)."
    if _apart(clipped, unclipped):
        if helps:
            return f"{choice}. It matters: {scores}, and their runs do not overlap."
        return f"Do not clip: {scores}, and their runs do not overlap."
    if helps:
        return f"It may not matter: {scores}, and their runs overlap. The best guess: {choice}."
    return f"It does not matter: {scores}, and their runs overlap."


def _apart(a: Mapping, b: Mapping) -> bool:
    """Whether the runs of two trials do not overlap."""
    return a["lowest"] > b["highest"] or b["lowest"] > a["highest"]


def _runs(row: Mapping, show) -> str:
    """The mean of a trial's runs, and their range."""
    if not row["runs"] > 1:
        return show(row["score"])
    return f"{show(row['score'])} ({show(row['lowest'])} to {show(row['highest'])})"


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
        if row["confirms"]:
            label += f" (trial {row['confirms']} with other seeds)"
        fraction = row["clip_fraction"]
        table.add_row(
            str(rank),
            show(row["score"]) if done else row["status"],
            spread,
            "" if math.isnan(fraction) else f"{100 * fraction:.3g} %",
            "" if math.isnan(row["seconds"]) else f"{row['seconds']:.0f} s",
            row["trial"],
            label,
            style="bold" if row["confirms"] else None,
        )
    console.print(table)


def curves(folder: Path, row: Mapping, metric: str) -> list[list[float]]:
    """The metric by epoch of each run of a trial, as far as its files are on this machine."""
    runs = sorted((folder / f"trial_{row['trial']}").glob("run-*/history.csv"))
    return [[line[metric] for line in read_rows(path) if metric in line] for path in runs]


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


def _is_nan(value) -> bool:
    return isinstance(value, float) and math.isnan(value)
