"""What a search leaves: a table, `trials.csv`, `best.json`, TensorBoard's HParams."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import keras_gradclip as kgc
from keras_gradclip.files import read_csv, write_csv, write_json
from keras_gradclip.tuning.space import to_clipper
from tuning.rows import TrialRow, best_row, describe, formatter
from tuning.verdict import verdict

_FIELDS = (
    *("trial", "status", "baseline", "confirms", "score", "lowest", "highest", "runs", "scores"),
    *("clip_fraction", "grad_norm", "epochs", "seconds"),
)


def write_trials(rows: Sequence[TrialRow], path: Path) -> None:
    """`trials.csv`: a line a trial, best first, a column a hyper-parameter; empty: not in use."""
    names = sorted({name for row in rows for name in row.values})
    lines = []
    for rank, row in enumerate(rows, 1):
        line = {"rank": rank, **{name: getattr(row, name) for name in _FIELDS}, **row.values}
        line["scores"] = " ".join(f"{score:.7g}" for score in row.scores)
        lines.append({name: "" if _is_nan(value) else value for name, value in line.items()})
    write_csv(path, ["rank", *_FIELDS, *names], lines)


def write_best(rows: Sequence[TrialRow], path: Path, objective, groups, recipe: str) -> dict | None:
    """`best.json`: the best trial's clipper, which recipes take with `--clip-config`.

    Where not clipping was best, the clipper is a ClipMap that leaves all variables alone.

    Returns:
        What was written; None, and nothing is, without a completed trial.
    """
    best = best_row(rows)
    if best is None:
        return None
    clipper = to_clipper(best.values, groups) or kgc.ClipMap({".*": None})
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
        "clipper": kgc.serialize(clipper),
    }
    write_json(path, content)
    return content


def write_hparams(rows: Sequence[TrialRow], folder: Path, objective) -> None:
    """For TensorBoard's page HParams: a run for each trial that ended; what is there stays.

    `folder` gets a folder a trial, with its values, its score, clip fraction and gradient norm.
    """
    import tensorflow as tf
    from tensorboard.plugins.hparams import api

    for row in rows:
        target = folder / row.trial
        if row.status == "running" or target.exists():
            continue
        figures = {
            objective.name: row.score,
            "clip_fraction": row.clip_fraction,
            "grad_norm": row.grad_norm,
        }
        partial = folder.parent / "tensorboard.partial"  # a kill leaves no half of a run
        shutil.rmtree(partial, ignore_errors=True)
        writer = tf.summary.create_file_writer(str(partial))
        with writer.as_default(step=0):
            api.hparams(dict(row.values), trial_id=row.trial)
            for name, value in figures.items():
                if math.isfinite(value):
                    tf.summary.scalar(name, value)
        writer.close()
        folder.mkdir(exist_ok=True)
        partial.rename(target)


def print_table(rows: Sequence[TrialRow], objective, title: str, console) -> None:
    """The ranked trials."""
    from rich.table import Table

    show = formatter(objective.name)
    caption = None
    if any(row.confirms for row in rows):
        caption = "bold, and first: the best of each kind again, with seeds that did not choose it"
    table = Table(title=title, caption=caption)
    for name in ("rank", objective.name, "runs from .. to", "clipped", "time", "trial", ""):
        table.add_column(name, justify="left" if not name else "right")
    for rank, row in enumerate(rows, 1):
        done = row.status == "completed"
        spread = ""
        if done and row.runs > 1:
            spread = f"{show(row.lowest)} .. {show(row.highest)}"
        label = describe(row.values) + (" (baseline)" if row.baseline else "")
        if row.confirms:
            label += f" (trial {row.confirms} with other seeds)"
        fraction = row.clip_fraction
        table.add_row(
            str(rank),
            show(row.score) if done else row.status,
            spread,
            "" if math.isnan(fraction) else f"{100 * fraction:.3g} %",
            "" if math.isnan(row.seconds) else f"{row.seconds:.0f} s",
            row.trial,
            label,
            style="bold" if row.confirms else None,
        )
    console.print(table)


def curves(folder: Path, row: TrialRow, metric: str) -> list[list[float]]:
    """The metric by epoch of each run of a trial, as far as its files are on this machine."""
    runs = sorted((folder / f"trial_{row.trial}").glob("run-*/history.csv"))
    return [[line[metric] for line in read_csv(path) if metric in line] for path in runs]


def _is_nan(value) -> bool:
    return isinstance(value, float) and math.isnan(value)
