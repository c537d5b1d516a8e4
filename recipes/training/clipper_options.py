"""Which clipper a run has: the flags of every registered clipper, and the choice among sources.

The flags are made from the clippers' own declarations (`keras_gradclip.clippers.parameters`). Two
clippers may share one: it then means what it means to the clipper that is chosen.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recipes.errors import RecipeError
from recipes.training.quiet import import_tensorflow

if TYPE_CHECKING:
    from keras_gradclip.clippers import Clipper, Parameter

NONE = "none"
_KINDS = {"number": float, "count": int, "word": str}


def flag_of(name: str) -> str:
    """`--max-norm` for `max_norm`."""
    return "--" + name.replace("_", "-")


def clippers() -> dict[str, type[Clipper]]:
    """The clippers that can be chosen, by name; loads TensorFlow."""
    import_tensorflow()
    from keras_gradclip.clippers import selectable

    return selectable()


def import_modules(names: object) -> None:
    """Imports the modules of `--import`, which register clippers.

    Args:
        names: str, modules separated by commas, found from the working folder too; or None.

    Raises:
        RecipeError: a module that cannot be imported.
    """
    if not isinstance(names, str):
        return
    import_tensorflow()
    if os.getcwd() not in sys.path:  # a script has its own folder there instead
        sys.path.append(os.getcwd())
    for name in filter(None, (part.strip() for part in names.split(","))):
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a user's module raises
            first = next(iter(str(error).splitlines()), "")
            raise RecipeError(f"--import {name}: {type(error).__name__}: {first}") from error


@dataclasses.dataclass(frozen=True)
class Flags:
    """The flags of the clippers: for each clipper, flag name to parameter."""

    by_clipper: Mapping[str, Mapping[str, Parameter]]

    @classmethod
    def of(cls, reserved: Sequence[str]) -> Flags:
        """The flags of all registered clippers.

        A parameter whose flag is `reserved`, or means another type of value to another clipper,
        has its clipper's name in front: `--my-clipper-epochs`.
        """
        from keras_gradclip.clippers import parameters

        kinds: dict[str, str] = {}
        by_clipper: dict[str, dict[str, Parameter]] = {}
        for alias, clipper in clippers().items():
            by_clipper[alias] = {}
            for parameter in parameters(clipper):
                if parameter.kind == "object":
                    continue
                flag = parameter.flag
                if flag in reserved or kinds.setdefault(flag, parameter.kind) != parameter.kind:
                    flag = f"{alias}_{flag}"
                by_clipper[alias][flag] = parameter
        return cls(by_clipper)

    def names(self) -> list[str]:
        """All flags, each once."""
        return list(dict.fromkeys(name for flags in self.by_clipper.values() for name in flags))

    def kind(self, name: str) -> type:
        """The type of a flag's value."""
        return _KINDS[self._meanings(name)[0].kind]

    def choices(self, name: str) -> tuple[str, ...]:
        """The words that some clipper takes, or ()."""
        words = (word for p in self._meanings(name) for word in p.choices if word is not None)
        return tuple(dict.fromkeys(words))

    def owners(self, name: str) -> list[str]:
        """The clippers that have the flag."""
        return [alias for alias, flags in self.by_clipper.items() if name in flags]

    def _meanings(self, name: str) -> list[Parameter]:
        return [self.by_clipper[alias][name] for alias in self.owners(name)]

    def check(self, clipper: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values by flag as values by parameter.

        Raises:
            RecipeError: a flag of another clipper, or a value that this one does not take.
        """
        known, result = self.by_clipper.get(clipper, {}), {}
        for flag, value in values.items():
            if flag not in known:
                raise RecipeError(
                    f"{flag_of(flag)} belongs to --clipper {' or '.join(self.owners(flag))}, not "
                    f"to {clipper!r}"
                )
            try:
                result[known[flag].name] = known[flag].check(clippers()[clipper].__name__, value)
            except ValueError as error:
                raise RecipeError(f"{flag_of(flag)} {value}: {error}") from None
        return result

    def values(self, clipper: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Values by parameter as values by flag: the inverse of `check`."""
        flags = self.by_clipper.get(clipper, {})
        return {flag: settings[p.name] for flag, p in flags.items() if p.name in settings}

    def help(self, chosen: str, settings: Mapping[str, Any]) -> str:
        """A section for each clipper; `settings` are the recipe's for `chosen`."""
        sections = []
        for alias, flags in self.by_clipper.items():
            page = argparse.ArgumentParser(add_help=False, usage=argparse.SUPPRESS)
            first = (inspect.getdoc(clippers()[alias]) or "").partition("\n")[0]
            add = page.add_argument_group(f"--clipper {alias}", first.replace("%", "%%"))
            for flag, p in flags.items():
                default = settings.get(flag, p.default) if alias == chosen else p.default
                notes = [] if default is None else [f"default: {default}"]
                notes += ["useful: {:g} to {:g}".format(*p.range)] if p.range else []
                text = f"{p.help} ({'; '.join(notes)})" if notes else p.help
                words = ",".join(word for word in p.choices if word)
                add.add_argument(
                    flag_of(flag),
                    help=text.replace("%", "%%"),
                    metavar=f"{{{words}}}" if words else flag.upper(),
                )
            sections.append(page.format_help().strip())
        return "\n\n".join(sections)


def choose(
    flags: Flags, sources: Sequence[Mapping[str, Any]], default: str
) -> tuple[str, dict | None, dict[str, Any]]:
    """The clipper of a run.

    The last source that names a clipper (or a serialised one) decides. What an earlier one says
    for another clipper is left out, so that a recipe's threshold does not outlive its clipper.

    Args:
        flags: the clippers' flags.
        sources: options by name, in rising order; the last one is the user's own.
        default: the clipper where no source names one.

    Returns:
        The clipper's name, the serialised clipper (the name then is "none") or None, and the
        values of the clipper's parameters.

    Raises:
        RecipeError: a flag of another clipper, or a clipper and a serialised one.
    """
    given = [
        {n: s[n] for n in ("clipper", "clip_config", *flags.names()) if s.get(n) is not None}
        for s in sources
    ]
    for own in reversed(given):
        if "clip_config" in own:
            clash = [name for name in own if name != "clip_config" and own[name] != NONE]
            clash += ["clipper"] * (own is given[-1] and "clipper" in own)
            if clash:
                raise RecipeError(
                    f"{flag_of(clash[0])} and --clip-config: give one of them, not both"
                )
            return NONE, own["clip_config"], {}
        if own:
            break
    named = [own.get("clipper") for own in given]
    clipper = next((name for name in reversed(named) if name), default)
    settings: dict[str, Any] = {}
    for name, own in zip(named, given, strict=True):
        is_first = own is given[0]
        if (name or (default if is_first else clipper)) == clipper:
            values = {n: v for n, v in own.items() if n not in ("clipper", "clip_config")}
            settings |= flags.check(clipper, values)
    return clipper, None, settings
