"""The commands of `python -m keras_gradclip`, whose flags are in `command_line`."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Sequence

import keras

from keras_gradclip.clippers import get
from keras_gradclip.clippers.cards import declarations
from keras_gradclip.command_line import imports_of, parse
from keras_gradclip.diagnostics.doctor import diagnose
from keras_gradclip.diagnostics.page import report
from keras_gradclip.optimizer._advice import AUTO, advice
from keras_gradclip.optimizer.clipped_optimizer import find


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, or 2 after a line `error: ...`."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        for module in imports_of(arguments):  # they may register clippers with flags
            try:
                importlib.import_module(module)
            except Exception as error:  # anything that a user's module raises
                raise ValueError(f"--import {module}: {type(error).__name__}: {error}") from error
        options = parse(arguments, declarations())
        if options.command == "report":
            print(report(options.run, options.output))
        else:
            print(_describe(options) if options.command == "describe" else diagnose())
        return 0
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _describe(options: argparse.Namespace) -> str:
    is_of_model = options.clipper in (None, AUTO)
    model = _load(options.model, compile=is_of_model)
    reason = ""
    if is_of_model:
        optimizer = getattr(model, "optimizer", None)
        wrapper = find(optimizer)
        clipper = None if wrapper is None else wrapper.clipper
        inner = optimizer if wrapper is None else wrapper.inner_optimizer
        if inner is not None:
            if not inner.built:
                inner.build(model.trainable_variables)
            chosen, why = advice(inner, model.trainable_variables)
            clipper = chosen if options.clipper == AUTO else clipper
            reason = why if chosen == clipper else ""
    else:
        clipper = get({"class_name": options.clipper, "config": options.clipping})
    if options.clipper == AUTO and clipper is None:
        raise ValueError(
            f"describe: {options.model} was saved without the optimizer that --clipper auto "
            "chooses for. Name another clipper."
        )
    if clipper is None:
        raise ValueError(
            f"describe: {options.model} was compiled without a clipper. Name one by --clipper."
        )
    text = clipper.describe(model)
    return f"{text}\n\nThe choice of clipper='auto': {reason}." if reason else text


def _load(path: str, *, compile: bool) -> keras.Model:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the optimizer's state, which is not needed
            return keras.saving.load_model(path, compile=compile)
    except Exception as error:  # Keras raises many types
        reason = str(error).strip().partition("\n")[0].partition(". ")[0][:200]
        raise ValueError(
            f"describe: {path} cannot be loaded as a Keras model ({reason}). Custom layers "
            "need --import MODULE."
        ) from error


if __name__ == "__main__":
    raise SystemExit(main())
