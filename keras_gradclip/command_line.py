"""The parser of all command lines, and the flags of `python -m keras_gradclip`.

Imports no Keras, so that `--help` and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from ._validation import did_you_mean
from .declarations import Declaration, Flags, declared, flags_of

_PROGRAM = "python -m keras_gradclip"
COMMANDS = {
    "report": "Writes the HTML page of a monitored run.",
    "describe": "Says which rule of a clipper hits which variable of a saved model.",
    "doctor": "Prints versions, devices, and the result of a trial update.",
}


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviated flags, whose mistakes raise exceptions.

    Args:
        prog: the command as typed.
        description: a line and a text, printed before and after the flags.
        examples: command lines; by default the indented paragraph of the description.
        usage: replaces `prog [--FLAG VALUE ...]`.
        **keywords: arguments of `argparse.ArgumentParser`.
    """

    #: The type of exception.
    mistake: type[Exception] = ValueError

    def __init__(
        self,
        prog: str,
        description: str | None = None,
        examples: Sequence[str] = (),
        usage: str = "",
        **keywords: Any,
    ):
        first, *rest = inspect.cleandoc(description or "").split("\n\n")
        if rest and rest[0].startswith(" ") and not examples:
            examples = rest.pop(0).split("\n")
        first, _, more = first.partition("\n")
        usage = usage or f"{prog} [--FLAG VALUE ...]"
        head = [first, "", f"usage: {usage}", "", *(f"  {line.strip()}" for line in examples)]
        super().__init__(
            prog=prog,
            usage=argparse.SUPPRESS,
            description="\n".join(head).strip(),
            epilog="\n\n".join([more, *rest, keywords.pop("epilog", "")]).strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **keywords,
        )

    @property
    def flags(self) -> list[str]:
        """The names of all flags."""
        return list(self._option_string_actions)

    def format_help(self) -> str:
        """The help, with the general flags last."""
        self._action_groups.sort(key=lambda group: group is self._optionals)
        return super().format_help()

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parses all arguments; suggests a similar flag for an unknown one."""
        result, rest = self.parse_known_args(args, namespace)
        if rest:
            self.refuse(rest)
        return result

    def refuse(self, words: Sequence[str], more: Iterable[str] = ()) -> NoReturn:
        """Raises an error about unknown words; `more` are flags to suggest besides its own."""
        first = next((word for word in words if word.startswith("--")), "").partition("=")[0]
        near = did_you_mean(first, [*self.flags, *more]) if first else ""
        self.error(f"unrecognized arguments: {' '.join(words)}{near}")

    def error(self, message: str) -> NoReturn:
        """Raises `mistake`."""
        raise self.mistake(f"{message} (see --help)")

    def add_clippers(
        self,
        declarations: Mapping[str, Declaration],
        flags: Flags,
        chosen: str | None,
        defaults: Mapping[str, object],
    ) -> None:
        """Adds the flags of the chosen clipper, if known, and `--help-clippers` for all of them.

        `defaults` replaces defaults in the help, by flag.
        """
        sections = []
        for alias, declaration in declarations.items():
            page = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
            for parser in (page, self) if alias == chosen else (page,):
                group = parser.add_argument_group(f"--clipper {alias}", declaration.summary)
                for flag, parameter in flags[alias].items():
                    default = defaults.get(flag) if alias == chosen else None
                    parameter.add_to(group, flag, default)
            sections.append(page.format_help())
        self.add_argument(
            "--help-clippers",
            action="version",
            version="\n".join(sections),
            help="show the flags of every clipper and exit",
        )


def early(arguments: Sequence[str], *flags: str) -> dict[str, list[str]]:
    """The values of some flags by name, parsed before the other flags are known."""
    parser = Parser("", add_help=False)
    for flag in flags:
        parser.add_argument(flag, nargs="?", action="append", default=[])
    found = vars(parser.parse_known_args(arguments)[0])
    return {name: [v for v in values if v is not None] for name, values in found.items()}


def imports_of(arguments: Sequence[str]) -> list[str]:
    """The values of `--import`."""
    return early(arguments, "--import")["import"]


def parse(arguments: Sequence[str], declarations: Mapping[str, Declaration]) -> argparse.Namespace:
    """The parsed arguments of `python -m keras_gradclip`; raises a ValueError on a mistake.

    Args:
        arguments: the arguments.
        declarations: the clippers by alias.

    Returns:
        A namespace with `command`, a key of `COMMANDS`; for `describe` also `clipping`, the given
        values of the clipper's parameters.
    """
    if not arguments or arguments[0] not in COMMANDS:
        lines = "\n".join(f"  {name:10}{text}" for name, text in COMMANDS.items())
        about = f"Reports on clipping: of a run, of a model, of this installation.\n\n{lines}"
        root = Parser(_PROGRAM, about, usage=f"{_PROGRAM} COMMAND ...")
        root.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="see below")
        root.parse_args(arguments[:1])
    name, *rest = arguments
    program = f"{_PROGRAM} {name}"
    if name == "describe":
        return _parse_describe(program, rest, declarations)
    places = " RUN [--output PAGE]" if name == "report" else ""
    parser = Parser(program, COMMANDS[name], usage=program + places)
    if name == "report":
        parser.add_argument("run", metavar="RUN", help="the folder of a ClipMonitor, or of a run")
        parser.add_argument("--output", metavar="PAGE", help="(default: report.html in RUN)")
    return parser.parse_args(rest, argparse.Namespace(command=name))


def _parse_describe(
    program: str, arguments: Sequence[str], declarations: Mapping[str, Declaration]
) -> argparse.Namespace:
    examples = [
        f"{program} model.keras",
        f"{program} model.keras --clipper norm --max-norm 1",
        f"{program} model.keras --clipper mine --import my_clippers",
    ]
    parser = Parser(
        program, COMMANDS["describe"], examples, f"{program} MODEL.keras [--FLAG VALUE ...]"
    )
    add = parser.add_argument
    add("model", metavar="MODEL.keras", help="a file of model.save(...)")
    add("--clipper", metavar="NAME", help="(default: the model's own)")
    add(
        "--import",
        dest="modules",
        metavar="MODULE",
        action="append",
        help="a module to import first, with custom clippers and layers",
    )
    classes = {declaration.name: alias for alias, declaration in declarations.items()}
    given = early(arguments, "--clipper")["clipper"]
    chosen = classes.get(given[-1], given[-1]) if given else None
    taken = ("model", "clipper", "modules", "import", "help", "help_clippers")
    flags = flags_of(declarations, (*taken, "command", "clipping"))
    parser.add_clippers(declarations, flags, chosen, {})
    options = parser.parse_args(arguments, argparse.Namespace(command="describe", clipping={}))
    names = ["auto", *declarations]
    if chosen is not None and chosen not in names:
        near = did_you_mean(chosen, names) or f": choose from {', '.join(names)}"
        parser.error(f"--clipper: no clipper is called {chosen!r}{near}")
    options.clipper = chosen
    for flag, parameter in flags.get(chosen or "", {}).items():
        value = getattr(options, flag)
        if value is not None:
            owner = declarations[options.clipper].name
            options.clipping[parameter.name] = parameter.check(owner, value)
    if not os.path.isfile(options.model):  # Path.is_file raises on long names
        raise ValueError(
            f"describe: there is no file {options.model!r}. Name a file of model.save(...)."
        )
    return options


def escape_output() -> None:
    """Lets stdout write the number of a character that its encoding lacks, as stderr does."""
    if getattr(sys.stdout, "errors", "") == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def answer_before_keras(arguments: Sequence[str]) -> None:
    """Prints `--help` or a mistake and exits, without importing Keras."""
    escape_output()
    try:
        if not imports_of(arguments):  # they may register clippers with flags
            parse(arguments, declared())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
