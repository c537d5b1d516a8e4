"""A run, from its first step or its backup to its result."""

import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import keras

import keras_gradclip as kgc
from keras_gradclip.files import write_json
from recipes.training import callbacks as cb
from recipes.training import checkpoint, plots
from recipes.training import folder as folders
from recipes.training import options as opts
from recipes.training.build import Setup, prepared, warnings
from recipes.training.options import Options
from recipes.training.recipe import Recipe, Result
from recipes.words import counted


def train(
    recipe: Recipe,
    options: Options,
    folder: Path,
    *,
    callbacks: Sequence[keras.callbacks.Callback],
    started: float,
) -> Result | None:
    """Trains as `recipes.training.run` says; `started` is `time.monotonic()` at the beginning."""
    with prepared(recipe, options) as setup:
        writes = setup.writes
        shows = writes and options.verbose != "quiet"
        for line in warnings(options):
            print(f"warning: {line}", file=sys.stderr)
        if shows:
            print("\n".join([*setup.description(), f"  results in {folder}"]), flush=True)
        setup.create_state()
        selection = checkpoint.Selection(options.select_best, recipe.monitor, recipe.mode)
        start = checkpoint.find_start(setup, folder, selection)
        ends = options.epochs * setup.steps
        if shows and start.step:
            print(_progress(start.step, ends, setup.steps), flush=True)
        if writes and not isinstance(start, checkpoint.Finished):
            write_json(folder / folders.CONFIG, opts.saved_options(recipe, options))

        monitored = None
        if start.step < ends:
            if options.monitor:
                # A resumed run measures from there on, in a folder of its own.
                since = f"-from-{start.step}" if start.step else ""
                monitored = folder / f"{folders.MONITOR}{since}"
            setup.model.fit(
                setup.shared(setup.stream, start.step),
                validation_data=setup.shared(setup.evaluation, setup.data.validation),
                initial_epoch=start.step // setup.steps,
                epochs=options.epochs,
                steps_per_epoch=setup.steps,
                shuffle=False,  # the stream is
                callbacks=[
                    *cb.chain(setup, start, folder, selection, monitored, started),
                    *callbacks,
                ],
                verbose=0,
            )
        if not writes:
            return None

        result = _result(setup, start, folder, selection)
        if monitored is not None:
            print(f"gradient report: {kgc.report(monitored)}")
        if not isinstance(start, checkpoint.Finished):
            seconds = start.seconds + time.monotonic() - started
            result = dataclasses.replace(result, seconds=seconds)
        if result.history[-1]["epoch"] >= options.epochs:
            write_json(folder / folders.RESULT, _summary(result))
            if not options.keep_backup:
                (folder / folders.BACKUP).unlink(missing_ok=True)
        return result


def _progress(done: int, ends: int, steps: int) -> str:
    """The line on a run that goes on after `done` of `ends` steps, `steps` an epoch."""
    if done >= ends:
        return "  finished: all steps are done, and nothing is trained"
    epoch, step = divmod(done, steps)
    return f"  going on from epoch {epoch + 1}, step {step + 1} ({counted(done, 'step')} done)"


def _result(
    setup: Setup, start: checkpoint.Start, folder: Path, selection: checkpoint.Selection
) -> Result:
    """What the run achieved, with the seconds of `start`; draws its curves."""
    recipe, rows = setup.recipe, start.history
    metric = recipe.monitor.removeprefix("val_")
    title = f"{recipe.name} on {setup.data.name}"
    plots.draw_curves(rows, start.layers, folder / "curves.png", title, metric)
    kept = selection.kept(rows)
    place = kept
    if place is None:
        place = max(range(len(rows)), key=lambda i: selection.sign * rows[i][recipe.monitor])
    fractions = [row["clip_fraction"] for row in rows if "clip_fraction" in row]
    return Result(
        recipe=recipe.name,
        output=folder,
        monitor=recipe.monitor,
        best=rows[place][recipe.monitor],
        best_epoch=place,
        kept=kept is not None,
        history=rows,
        test={} if kept is None else setup.test(folder / folders.BEST),
        parameters=setup.exported.count_params(),
        clip_fraction=sum(fractions) / len(fractions) if fractions else float("nan"),
        seconds=start.seconds,
        data=setup.data,
    )


def _summary(result: Result) -> dict[str, object]:
    """What `result.json` holds."""
    return {
        "recipe": result.recipe,
        "monitor": result.monitor,
        "best": result.best,
        "best_epoch": result.best_epoch + 1,
        "epochs": len(result.history),
        "test": dict(result.test),
        "parameters": result.parameters,
        "clip_fraction": None if math.isnan(result.clip_fraction) else result.clip_fraction,
        "seconds": round(result.seconds, 1),
    }
