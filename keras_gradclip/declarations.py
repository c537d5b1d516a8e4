"""Declarations of clippers: parameters, the row in the docs, and the figure to calibrate.

Command lines, search spaces, `calibrate` and the table in the docs are generated from these.
`declarations.json` is a copy of the parameters for command lines, which parse flags before they
import Keras; `python -m keras_gradclip.clippers.cards` writes it.
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
#: without a flag and never searched, such as a dict of axes or a list of clippers.
Kind = Literal["number", "count", "word", "object"]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One hyper-parameter of a clipper.

    Attributes:
        name: the field's name.
        default: the field's default, or `dataclasses.MISSING`.
        kind: see `Kind`.
        help: half a line for `--help`.
        range: (low, high) of useful values and of a search; None if it is not searched.
        log: search on a log scale.
        choices: the values of a "word"; with None if the choice is optional.
        search: vary it in a search by default.
        live: may be a schedule, and may change during training without a retrace.
        threshold: determines how much is clipped: `calibrate` suggests it, and a search may vary it
            by groups of layers.
        below: exclusive upper bound.
        at_most: inclusive upper bound.
        flag: the flag's name with underscores, if different from `name`.
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
        """The validated value; raises a ValueError if the parameter does not accept it."""
        if self.live or self.kind == "number":
            check = validation.threshold if self.live else validation.positive
            return check(owner, self.name, value, below=self.below, at_most=self.at_most)
        if self.kind == "count":
            return validation.count(owner, self.name, value)
        if self.kind == "word":
            return validation.choice(owner, self.name, value, self.choices, self.note)
        return value

    def read(self, text: str) -> float | int | str:
        """The value of a flag before `check`; raises a ValueError if it must be a number."""
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
        """Adds the flag to a parser; without it, the namespace has None.

        Args:
            parser: an `argparse` parser or group.
            flag: replaces `self.flag` as the flag (with underscores) and name in the namespace.
            default: replaces the default in the help.
            searched: add a search's flag instead: `--max-norm-range LOW HIGH`, `--rescales WORD
                ...`.
            help: replaces the help.
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

    By default, `kind` follows from the other arguments, and `search` is true with a range.
    """
    if kind is None:
        if declared.get("choices"):
            kind = "word"
        elif declared.get("live") or isinstance(default, float):
            kind = "number"
        else:
            kind = "count" if type(default) is int else "object"
    declared = {"search": declared.get("range") is not None, **declared}
    made = Parameter("", default, kind, help, **declared)
    return dataclasses.field(default=default, metadata={_KEY: made})


def parameters(clipper: Any) -> tuple[Parameter, ...]:
    """The hyper-parameters of a clipper or its class, in the order of its fields.

    A field without `parameter` is an "object", and live if the class lists it in `live`.
    """
    result = []
    for f in dataclasses.fields(clipper):
        if f.init:
            made = f.metadata.get(_KEY) or Parameter("", None, live=f.name in clipper.live)
            flag = made.flag or f.name
            result.append(dataclasses.replace(made, name=f.name, default=f.default, flag=flag))
    return tuple(result)


class Declaration(NamedTuple):
    """The class name of a clipper, its docstring's first line, and its parameters with a flag."""

    name: str
    summary: str
    parameters: tuple[Parameter, ...]

    @classmethod
    def of(cls, clipper: type) -> Declaration:
        """The declaration of a class."""
        summary = (inspect.getdoc(clipper) or "").partition("\n")[0]
        flagged = tuple(p for p in parameters(clipper) if p.kind != "object")
        return cls(clipper.__name__, summary, flagged)


def declared() -> dict[str, Declaration]:
    """The declarations of this package's clippers by alias, from `declarations.json`."""
    content = json.loads(TABLE.read_text(encoding="utf-8"))
    result = {}
    for alias, (name, summary, rows) in content.items():
        for row in rows:
            row |= {key: tuple(row[key]) for key in ("range", "choices") if row.get(key)}
        result[alias] = Declaration(name, summary, tuple(Parameter(**row) for row in rows))
    return result


def as_json(declarations: Mapping[str, Declaration]) -> str:
    """The text of `declarations.json`, with one parameter per line, without defaults."""
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
    """The flags (with underscores) and parameters of each clipper by alias.

    Clippers may share a flag. One that is `reserved`, or of another kind elsewhere, gets the
    clipper's alias as a prefix: `my_clipper_epochs`.
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
        text: its description.
        needs: parameters of the clipper that the figure depends on, attributes of `Calibration`.
        at_most: the attribute of `Calibration` that caps suggestions; a larger figure means that
            the learning rate is too high.
    """

    text: str
    needs: tuple[str, ...] = ()
    at_most: str | None = None


#: The figures that `calibrate` measures; a clipper names one in `measures`.
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
