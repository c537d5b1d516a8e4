"""Composite clippers: a chain of clippers, and a map from variables to clippers."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import keras

from keras_gradclip import _validation as validation
from keras_gradclip._types import Config, Threshold
from keras_gradclip.clippers.base import Clipper, as_clipper, register, serialize_value
from keras_gradclip.clippers.enforce import Assignment
from keras_gradclip.declarations import Card
from keras_gradclip.names import names_of, path_of

DEFAULT = "default"


class Composite(Clipper):
    """A clipper made of named parts; the names prefix hyper-parameters and state."""

    selectable: ClassVar[bool] = False

    def _parts(self) -> list[tuple[str, Clipper]]:
        raise NotImplementedError  # abstract: Chain's and ClipMap's

    def _with_parts(self, parts: dict[str, Clipper]) -> Clipper:
        raise NotImplementedError  # abstract: Chain's and ClipMap's

    def _groups(self, variables: Sequence[keras.Variable]) -> list[tuple[str, Clipper, list[int]]]:
        """The parts and the positions of the variables that each clips."""
        return [(name, part, [*range(len(variables))]) for name, part in self._parts()]

    def assignments(
        self, variables: Sequence[keras.Variable], inherited: bool = False
    ) -> list[Assignment]:
        """See `Clipper`: those of the parts, unless a subclass overrides `apply`."""
        if type(self).apply is not Clipper.apply and not inherited:
            return super().assignments(variables)
        return [
            a._replace(name=f"{name}/{a.name}", members=tuple(members[k] for k in a.members))
            for name, part, members in self._groups(variables)
            for a in part.assignments([variables[i] for i in members])
        ]

    def check_variables(self, variables: Sequence[keras.Variable]) -> None:
        """Raises a ValueError if a part cannot be used with its variables."""
        for _, part, members in self._groups(variables):
            part.check_variables([variables[i] for i in members])

    @property
    def has_rules(self) -> bool:  # type: ignore[override]
        """Whether any part does."""
        return any(clipper.has_rules for _, clipper in self._parts())

    def hyperparameters(self) -> dict[str, Threshold]:
        """The parts' live hyper-parameters, as `part/name`."""
        return {
            f"{part}/{name}": value
            for part, clipper in self._parts()
            for name, value in clipper.hyperparameters().items()
        }

    def _check_names(self) -> None:
        """Raises a ValueError if the name of a part collides with a nested one's."""
        names = [name for name, _ in self._parts()]
        for name, clipper in self._parts():
            for nested in _prefixes(clipper):
                key = f"{name}/{nested}"
                owner = max((n for n in names if key.startswith(f"{n}/")), key=len)
                if owner != name:
                    raise ValueError(
                        f"{type(self).__name__}: the rule {owner!r} and a rule inside {name!r} "
                        f"would both be called {key[:-1]!r}. Write one of them another way, e.g. "
                        f"'({owner})'."
                    )

    def with_hyperparameters(self, values: Mapping[str, Threshold]) -> Clipper:
        """A copy with other values: see `Clipper.with_hyperparameters`."""
        unknown = sorted(set(values) - set(self.hyperparameters()))
        if unknown:
            raise ValueError(f"{type(self).__name__}: unknown hyper-parameters {unknown}.")
        parts = {}
        for part, clipper in self._parts():
            own = {name: f"{part}/{name}" for name in clipper.hyperparameters()}
            new = {name: values[key] for name, key in own.items() if key in values}
            parts[part] = clipper.with_hyperparameters(new)
        return self._with_parts(parts)


def _prefixes(clipper: Clipper) -> list[str]:
    """The prefixes of a clipper's hyper-parameters and state."""
    if not isinstance(clipper, Composite):
        return [""]
    return [f"{name}/{rest}" for name, part in clipper._parts() for rest in _prefixes(part)]


@functools.lru_cache(maxsize=64)
def _matches(patterns: tuple[str, ...], paths: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """The patterns that match each path in full; cached per set of variables."""
    compiled = [(pattern, re.compile(pattern)) for pattern in patterns]
    return tuple(tuple(p for p, rule in compiled if rule.fullmatch(path)) for path in paths)


@register("clip_map")
@dataclasses.dataclass(frozen=True)
class ClipMap(Composite):
    """Clips each variable by the rule whose regular expression matches its path in full.

    ```python
    ClipMap({"conv1/.*": AbsoluteClip(0.01), ".*/bias": None}, default=NormClip(1.0))
    ```

    If two layers have the same path (in two networks), the second one's is `head#2/kernel`, as in
    reports: a rule that matches this name has precedence; a rule for the plain path matches both.

    Rules in a dict have no order, so two rules that match one variable are an error. In a list of
    `(regex, clipper)` pairs the first match wins. Live hyper-parameters are named
    by rule: `clip_hyperparameters["conv1/.*/threshold"]`, `["default/threshold"]`.

    Args:
        rules: a dict, or a list of pairs, from regular expression to clipper; None as the
            clipper excludes the variables.
        default: the clipper of all other variables; None excludes them.
        allow_unmatched: allow rules that match nothing (for example, of a frozen layer).

    Raises:
        ValueError: no rules, an invalid regular expression, a rule that is not a clipper; once
            the variables are known, a rule that matches none of them, or two that match one.
    """

    card: ClassVar[Card | None] = Card(
        "another clipper for each group of variables",
        "layers that need their own threshold, or none",
        "`calibrate(...).clip_map()`",
    )
    has_rules: ClassVar[bool] = True
    rules: Any = ()
    default: Clipper | str | Config | None = None
    allow_unmatched: bool = False
    ordered: bool = dataclasses.field(default=False, init=False)

    def __post_init__(self) -> None:
        ordered = not isinstance(self.rules, Mapping)
        if ordered and (isinstance(self.rules, str) or not isinstance(self.rules, Sequence)):
            raise ValueError(
                f"ClipMap: `rules` must be a dict or a list of (regex, clipper) pairs, but is "
                f"{self.rules!r}."
            )
        if not self.rules:
            raise ValueError(
                "ClipMap: `rules` is empty. Give at least one rule, or use the default clipper "
                "itself instead of a ClipMap."
            )
        checked: dict[str, Clipper | None] = {}
        for rule in self.rules if ordered else self.rules.items():
            if not _is_rule(rule):
                raise ValueError(
                    f"ClipMap: each rule must be a (regex, clipper) pair, but {rule!r} is none."
                )
            pattern, clipper = rule
            try:
                re.compile(pattern)
            except re.error as error:
                message = f"ClipMap: {pattern!r} is no regular expression: {error}."
                raise ValueError(message) from error
            if pattern in (*checked, DEFAULT):
                raise ValueError(
                    f"ClipMap: the rule {pattern!r} is there twice or has the name of the default. "
                    "Write it another way, e.g. in brackets."
                )
            name = f"rules[{pattern!r}]"
            checked[pattern] = as_clipper("ClipMap", name, clipper, optional=True)
        default = as_clipper("ClipMap", "default", self.default, optional=True)
        object.__setattr__(self, "rules", tuple(checked.items()))
        object.__setattr__(self, "ordered", ordered)
        object.__setattr__(self, "default", default)
        self._check_names()

    def _all(self) -> list[tuple[str, Clipper | None]]:
        return [*self.rules, (DEFAULT, self.default)]

    def _parts(self) -> list[tuple[str, Clipper]]:
        return [(name, c) for name, c in self._all() if c is not None]

    def _with_parts(self, parts: dict[str, Clipper]) -> Clipper:
        pairs = [(name, parts.get(name)) for name, _ in self.rules]
        rules = pairs if self.ordered else dict(pairs)
        return dataclasses.replace(self, rules=rules, default=parts.get(DEFAULT))

    def _assign(self, variables: Sequence[keras.Variable], check: bool = False) -> list[str]:
        """The name of each variable's rule; `check` refuses a rule without a match."""
        hits = dict.fromkeys((name for name, _ in self.rules), 0)
        names = []
        paths = tuple(path_of(v) for v in variables)
        by_name = _matches(tuple(hits), tuple(names_of(variables)))
        by_path = _matches(tuple(hits), paths)
        used = {*itertools.chain(*by_name, *by_path)}
        rest = tuple(name for name in hits if name not in used)  # written for a loaded model
        by_own = _matches(rest, tuple(path_of(v, as_saved=False) for v in variables))
        for path, *found in zip(paths, by_name, by_path, by_own, strict=True):
            matches = next(filter(None, found), ())
            if len(matches) > 1 and not self.ordered:
                raise ValueError(
                    f"ClipMap: the rules {list(matches)} all match the variable {path!r}, and a "
                    "dict has no order. Make them exclusive, or pass a list of (regex, clipper) "
                    "pairs: there the first match wins."
                )
            for name in matches:
                hits[name] += 1
            names.append(matches[0] if matches else DEFAULT)
        unmatched = [name for name, count in hits.items() if count == 0]
        if check and unmatched and not self.allow_unmatched:
            near = difflib.get_close_matches(unmatched[0], names_of(variables), n=3, cutoff=0.0)
            raise ValueError(
                f"ClipMap: the rule {unmatched[0]!r} matches none of the {len(paths)} variables; "
                f"paths that come near: {near}. A rule must match the whole path (`.*` at its "
                "end?). If its layer is frozen or comes later, pass allow_unmatched=True."
            )
        return names

    def check_variables(self, variables: Sequence[keras.Variable]) -> None:
        """Raises a ValueError on collisions and on rules that match nothing."""
        self._assign(variables, check=True)
        super().check_variables(variables)

    def _groups(self, variables: Sequence[keras.Variable]) -> list[tuple[str, Clipper, list[int]]]:
        assigned = self._assign(variables)
        groups = []
        for name, clipper in self._parts():
            members = [i for i, a in enumerate(assigned) if a == name]
            if members:
                groups.append((name, clipper, members))
        return groups

    def rule_of(self, variables: Sequence[keras.Variable]) -> list[tuple[str, Clipper | None]]:
        """The rule and the clipper, if any, that apply to each variable."""
        clippers = dict(self._all())
        return [(name, clippers[name]) for name in self._assign(variables)]

    def get_config(self) -> Config:
        """The JSON-able rules; keeps the order of a list."""
        return {
            "rules": [[name, serialize_value(clipper)] for name, clipper in self.rules],
            "default": serialize_value(self.default),
            "allow_unmatched": self.allow_unmatched,
            "ordered": self.ordered,
        }

    @classmethod
    def from_config(cls, config: Config) -> Clipper:
        """The map of a config."""
        known = ("rules", "default", "allow_unmatched", "ordered")
        config = validation.config(cls.__name__, config, known, needed=("rules",))
        rules = config["rules"]
        # Anything but a list of pairs, such as a hand-written dict, is checked by the constructor.
        if isinstance(rules, Sequence) and all(map(_is_rule, rules)):
            rules = rules if config.get("ordered", True) else dict(rules)
        return cls(rules, config.get("default"), config.get("allow_unmatched", False))

    def __str__(self) -> str:
        rules = ", ".join(f"{name!r}: {clipper or 'off'}" for name, clipper in self.rules)
        return f"ClipMap({{{rules}}}, default={self.default or 'off'})"


def _is_rule(rule: object) -> bool:
    if isinstance(rule, str) or not isinstance(rule, Sequence):
        return False
    return len(rule) == 2 and isinstance(rule[0], str)


@register("chain")
@dataclasses.dataclass(frozen=True)
class Chain(Composite):
    """Several clippers in a row, each clipping what the one before let through.

    Live hyper-parameters are named by position: `clip_hyperparameters["0/threshold"]`. The clip
    fraction of a variable is the largest among the clippers; if some count elements and others
    norms, a clipped norm counts as all its elements.

    Args:
        clippers: a list of clippers, at least one.

    Raises:
        ValueError: an empty list, or an entry that is not a clipper.
    """

    card: ClassVar[Card | None] = Card(
        "several in a row",
        "a memory and a hard bound",
        '`Chain([ZScoreClip(), NormClip(1.0, "global")])`',
    )
    clippers: Sequence[Clipper] = ()

    def __new__(cls, clippers: Sequence[object] = (), *more: object) -> Chain:
        """Rejects `Chain(first, second)` with a clear message."""
        del clippers
        if more:
            raise ValueError(
                f"Chain: `clippers` must be a list of clippers, but {1 + len(more)} arguments "
                "came. Write Chain([first, second])."
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if isinstance(self.clippers, (Clipper, str, Mapping)) or not isinstance(
            self.clippers, Sequence
        ):
            raise ValueError(
                f"Chain: `clippers` must be a list of clippers, but is {self.clippers!r}. "
                "Write Chain([first, second])."
            )
        if not self.clippers:
            raise ValueError("Chain: `clippers` is empty. Pass at least one clipper.")
        parts = tuple(
            as_clipper("Chain", f"clippers[{i}]", c, optional=False)
            for i, c in enumerate(self.clippers)
        )
        object.__setattr__(self, "clippers", parts)
        self._check_names()

    def _parts(self) -> list[tuple[str, Clipper]]:
        return [(str(i), c) for i, c in enumerate(self.clippers)]

    def _with_parts(self, parts: dict[str, Clipper]) -> Clipper:
        return dataclasses.replace(self, clippers=[*parts.values()])

    def get_config(self) -> Config:
        """The JSON-able clippers."""
        return {"clippers": [serialize_value(c) for c in self.clippers]}

    @classmethod
    def from_config(cls, config: Config) -> Clipper:
        """The chain of a config."""
        config = validation.config(cls.__name__, config, ("clippers",), needed=("clippers",))
        return cls(config["clippers"])

    def __str__(self) -> str:
        return " → ".join(str(c) for c in self.clippers)
