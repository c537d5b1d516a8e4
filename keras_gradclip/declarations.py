"""Declarations of clippers: parameters, the row in the docs, and the figure to calibrate.

Command lines, search spaces, `calibrate` and the table in the docs are generated from these and the
registry. `declarations.json` is a copy of the parameters of this package's clippers for command
lines, which parse flags before they import Keras; `python -m keras_gradclip.clippers.cards` writes
it, and a test compares.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from . import _validation as validation  # relative: recipes load this file without the package

_KEY = "keras_gradclip"
_TYPES = {"number": float, "count": int, "word": str}
TABLE = Path(__file__).with_suffix(".json")

#: number: a float above 0. count: an integer of at least 1. word: one of `choices`. object: a value
#: without a flag (a dict of axes, a list of clippers), never searched.
Kind = Literal["number", "count", "word", "object"]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One hyper-parameter of a clipper.

    Attributes:
        name: the field's name.
        default: the field's default, or `dataclasses.MISSING`.
        kind: see `Kind`.
        help: half a line for `--help`.
        range: (low, high) of useful values, the range of a search; None: not searched.
        log: the range is searched on a log scale.
        choices: the words of a "word"; includes None if the choice is optional.
        search: a search varies it by default.
        live: may be a schedule, and may change during training without a retrace.
        threshold: decides how much is clipped; `calibrate` suggests it, and groups of layers may
            have separate ones.
        below: exclusive upper bound.
        at_most: inclusive upper bound.
        flag: the flag's name with underscores, if different from the parameter's.
        note: a hint in the error message for a wrong word.
    """

    name: str
    default: Any
    kind: Kind = "object"
    help: str = ""
    range: tuple[float, float] | None = None
    log: bool = False
    choices: tuple[str | None, ...] = ()
    search: bool = False
    live: bool = False
    threshold: bool = False
    below: float | None = None
    at_most: float | None = None
    flag: str = ""
    note: str = ""

    def check(self, owner: str, value: Any) -> Any:
        """The validated value: a float, an int, a schedule or a word.

        Raises:
            ValueError: the parameter does not accept this value.
        """
        if self.live or self.kind == "number":
            check = validation.threshold if self.live else validation.positive
            return check(owner, self.name, value, below=self.below, at_most=self.at_most)
        if self.kind == "count":
            return validation.count(owner, self.name, value)
        if self.kind == "word":
            return validation.choice(owner, self.name, value, self.choices, self.note)
        return value

    def read(self, text: str) -> float | int | str:
        """The number or word in a command line's `text`, before `check`.

        Raises:
            ValueError: `text` is not a number.
        """
        return _TYPES[self.kind](text)

    def add_to(
        self,
        parser: argparse._ActionsContainer,
        flag: str = "",
        default: object = None,
        *,
        searched: bool = False,
        help: str = "",
    ) -> None:
        """Adds the flag to a parser; the value is None if it is not given.

        Args:
            parser: an `argparse` parser or group.
            flag: replaces the parameter's flag (with underscores); the name in the namespace.
            default: replaces the declared default in the help.
            searched: add the flag of a search instead: `--max-norm-range LOW HIGH`,
                `--rescales WORD ...`.
            help: replaces the declared help.
        """
        flag, default = flag or self.flag, self.default if default is None else default
        notes = [] if default is None or searched else [f"default: {default}"]
        if self.range:
            notes.append("useful: {:g} to {:g}".format(*self.range))
        text = help or self.help + (f" ({'; '.join(notes)})" if notes else "")
        words = [word for word in self.choices if word is not None]
        keywords: dict[str, Any] = {"help": text.replace("%", "%%"), "type": _TYPES[self.kind]}
        if searched and self.kind == "word":
            flag, words = f"{flag}s", []
            keywords |= {"nargs": "+", "metavar": "WORD"}
        elif searched:
            flag = f"{flag}_range"
            keywords |= {"nargs": 2, "metavar": ("LOW", "HIGH"), "type": float}
        else:
            keywords["metavar"] = "{" + ",".join(words) + "}" if words else flag.upper()
        parser.add_argument(
            f"--{flag.replace('_', '-')}", dest=flag, choices=words or None, **keywords
        )


def parameter(default: object, *, help: str, kind: Kind | None = None, **declared: Any) -> Any:
    """A dataclass field that declares a hyper-parameter; the arguments are `Parameter`'s.

    `kind` is derived from `choices` and the default's type; `search` from the presence of a range.
    """
    if kind is None:
        is_live = declared.get("live", False)
        is_count = isinstance(default, int) and not isinstance(default, bool) and not is_live
        is_number = is_live or isinstance(default, float)
        is_word = bool(declared.get("choices"))
        kind = "word" if is_word else "count" if is_count else "number" if is_number else "object"
    declared = {"search": declared.get("range") is not None, **declared}
    made = Parameter("", default, kind, help, **declared)
    return dataclasses.field(default=default, metadata={_KEY: made})


def parameters(clipper: Any) -> tuple[Parameter, ...]:
    """The hyper-parameters of a clipper or of a clipper's class, in the order of its fields.

    A field not declared by `parameter` has the kind "object", and is live if the class lists it in
    `live`.
    """
    result = []
    for f in dataclasses.fields(clipper):
        if f.init:
            made = f.metadata.get(_KEY) or Parameter("", None, live=f.name in clipper.live)
            flag = made.flag or f.name
            result.append(dataclasses.replace(made, name=f.name, default=f.default, flag=flag))
    return tuple(result)


class Declaration(NamedTuple):
    """The part of a clipper that command lines need.

    Attributes:
        name: the class name.
        summary: the first line of its docstring.
        parameters: the parameters that a flag can set.
    """

    name: str
    summary: str
    parameters: tuple[Parameter, ...]

    @classmethod
    def of(cls, clipper: type) -> Declaration:
        """The declaration of a clipper's class."""
        summary = (inspect.getdoc(clipper) or "").partition("\n")[0]
        flagged = tuple(p for p in parameters(clipper) if p.kind != "object")
        return cls(clipper.__name__, summary, flagged)


def declared() -> dict[str, Declaration]:
    """The clippers of this package by alias, read from `declarations.json`."""
    content = json.loads(TABLE.read_text(encoding="utf-8"))
    result = {}
    for alias, (name, summary, rows) in content.items():
        for row in rows:
            row |= {key: tuple(row[key]) for key in ("range", "choices") if row.get(key)}
        result[alias] = Declaration(name, summary, tuple(Parameter(**row) for row in rows))
    return result


def as_json(declarations: Mapping[str, Declaration]) -> str:
    """The text of `declarations.json`: the values that differ from the defaults of `Parameter`."""
    usual = {f.name: f.default for f in dataclasses.fields(Parameter)}
    sections = []
    for alias, (name, summary, parameters) in declarations.items():
        rows = []
        for p in parameters:
            values = {k: v for k, v in vars(p).items() if k == "default" or v != usual[k]}
            rows.append(json.dumps(values, ensure_ascii=False))
        head = json.dumps([name, summary], ensure_ascii=False)[:-1]
        sections.append(f'"{alias}": {head}, [\n  ' + ",\n  ".join(rows) + "\n]]")
    return "{\n" + ",\n".join(sections) + "\n}\n"


Flags = dict[str, dict[str, Parameter]]


def flags_of(declarations: Mapping[str, Declaration], reserved: Collection[str] = ()) -> Flags:
    """The flags (with underscores) and parameters of each clipper.

    Clippers may share a flag. If it is `reserved`, or has a different kind in another clipper, the
    clipper's name comes first: `my_clipper_epochs`.
    """
    kinds: dict[str, str] = {}
    result: Flags = {}
    for alias, declaration in declarations.items():
        result[alias] = {}
        for p in declaration.parameters:
            is_free = p.flag not in reserved and kinds.setdefault(p.flag, p.kind) == p.kind
            result[alias][p.flag if is_free else f"{alias}_{p.flag}"] = p
    return result


class Measure(NamedTuple):
    """A figure of a layer's gradient that a threshold limits.

    Attributes:
        text: a description.
        needs: parameters of the clipper that the `Calibration` has as attributes.
        at_most: the attribute of the `Calibration` that caps suggestions: a larger figure means
            that the learning rate is too high.
    """

    text: str
    needs: tuple[str, ...] = ()
    at_most: str | None = None


#: The figures that `calibrate` can measure; a clipper names one in `measures`.
MEASURES = {
    "layer_norm": Measure("L2 norm of the layer's gradient"),
    "largest_element": Measure("largest element"),
    "largest_scaled_element": Measure("largest |g|·exp(−β·W)", ("beta",)),
    "unit_ratio": Measure(
        "largest ratio of a kernel's unit's gradient norm to its weight norm", ("eps",)
    ),
    "unit_step": Measure(
        "largest share of its weights' norm that a step would move a kernel's unit",
        ("eps", "anneal"),
        at_most="max_ratio",
    ),
    "largest_rms": Measure("largest root mean square of a variable's gradient"),
}


class Card(NamedTuple):
    """A clipper's row in the table of the docs, in Markdown.

    Attributes:
        does: the rule in one phrase.
        when: suitable situations and optimizers.
        suggested: starting values.
        source: paper or package.
    """

    does: str
    when: str
    suggested: str = ""
    source: str = ""
