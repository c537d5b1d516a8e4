"""`python -m keras_gradclip`: a run's report, what a clipper would hit, and the installation."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import keras

from keras_gradclip.clippers import Clipper, Parameter, get, parameters, selectable
from keras_gradclip.diagnostics.doctor import diagnose
from keras_gradclip.diagnostics.page import report
from keras_gradclip.optimizer._advice import AUTO, choose
from keras_gradclip.optimizer.clipped_optimizer import find


class _Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        self.exit(2, f"error: {message}. `{self.prog} --help` lists what there is.\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status: 0, or 2 after a line that begins with `error:`."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        options = _parse(arguments)
        return options.command(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    first = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    first.add_argument("--import", dest="modules", action="append", default=[])
    first.add_argument("--clipper")
    try:
        early = first.parse_known_args(arguments)[0]
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    for module in early.modules:  # before the flags: they register clippers
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a user's module raises
            raise ValueError(f"--import {module}: {type(error).__name__}: {error}") from error

    parser = _Parser(prog="python -m keras_gradclip", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    page = commands.add_parser("report", help="write the HTML page of a monitored run")
    page.add_argument(
        "run", metavar="RUN", help="the folder of a ClipMonitor, or of a recipe's run"
    )
    page.add_argument("--output", metavar="PAGE", help="by default report.html in that folder")
    page.set_defaults(command=_report)

    rules = commands.add_parser(
        "describe",
        help="say which rule of a clipper hits which variable of a saved model",
        epilog=_flags_of_all(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    rules.add_argument("model", metavar="MODEL.keras", help="a file of model.save(...)")
    rules.add_argument(
        "--clipper", metavar="NAME", help="by default the one that the model was compiled with"
    )
    rules.add_argument(
        "--import",
        dest="modules",
        metavar="MODULE",
        action="append",
        help="import first, for clippers and layers of your own",
    )
    for parameter in _flagged(selectable().get(early.clipper)):
        rules.add_argument(_flag(parameter), dest=f"clip_{parameter.name}", **_keywords(parameter))
    rules.set_defaults(command=_describe)

    doctor = commands.add_parser("doctor", help="versions, devices, a trial update, private names")
    doctor.set_defaults(command=lambda options: print(diagnose()) or 0)
    return parser.parse_args(arguments)


def _report(options: argparse.Namespace) -> int:
    print(report(options.run, options.output))
    return 0


def _describe(options: argparse.Namespace) -> int:
    model = _load(options.model, compile=options.clipper in (None, AUTO))
    reason = ""
    if options.clipper in (None, AUTO):
        optimizer = getattr(model, "optimizer", None)
        wrapper = find(optimizer)
        clipper = None if wrapper is None else wrapper.clipper
        inner = optimizer if wrapper is None else wrapper.inner_optimizer
        if inner is not None:
            if not inner.built:
                inner.build(model.trainable_variables)
            chosen, reason = choose(inner, model.trainable_variables)
            if options.clipper == AUTO:
                clipper = chosen
            elif chosen != clipper:
                reason = ""
    else:
        values = {k.removeprefix("clip_"): v for k, v in vars(options).items() if "clip_" in k}
        config = {name: value for name, value in values.items() if value is not None}
        clipper = get({"class_name": options.clipper, "config": config})
    if clipper is None:
        raise ValueError(
            f"describe: {options.model} was compiled without a clipper. Name one by --clipper."
        )
    print(clipper.describe(model))
    if reason:
        print(f"\nThe choice of clipper='auto': {reason}.")
    return 0


def _load(path: str, *, compile: bool) -> Any:
    if not Path(path).is_file():
        raise ValueError(f"describe: there is no file {path!r}. Name a file of model.save(...).")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the optimizer's state, which nobody needs here
            return keras.saving.load_model(path, compile=compile)
    except Exception as error:  # Keras stumbles over what is no model in a dozen ways
        reason = str(error).strip().partition("\n")[0].partition(". ")[0][:200]
        raise ValueError(
            f"describe: {path} cannot be loaded as a Keras model ({reason}). Layers of your own "
            "need --import MODULE."
        ) from error


def _flagged(cls: type[Clipper] | None) -> list[Parameter]:
    return [p for p in parameters(cls) if p.kind != "object"] if cls else []


def _flag(parameter: Parameter) -> str:
    return "--" + parameter.flag.replace("_", "-")


def _keywords(parameter: Parameter) -> dict[str, Any]:
    types = {"number": float, "count": int, "word": str}
    keywords: dict[str, Any] = {"type": types[parameter.kind], "help": parameter.help}
    if parameter.kind == "word":
        keywords["choices"] = [c for c in parameter.choices if c is not None]
    return keywords


def _flags_of_all() -> str:
    lines = ["A clipper's flags, with their defaults:"]
    for alias, cls in sorted(selectable().items()):
        flags = (f"{_flag(p)} {p.default}" for p in _flagged(cls))
        lines.append(f"  --clipper {alias}: {', '.join(flags)}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
