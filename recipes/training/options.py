"""The options of a run, from the command line, a `config.json` and the recipe's own settings.

A value comes from, in rising order: the table, the recipe's `settings`, `--config FILE`, the
command line. All of them pass the same checks.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping
from typing import Any

from keras_gradclip import files
from keras_gradclip.names import did_you_mean
from recipes.command_line import Parser
from recipes.errors import RecipeError
from recipes.training.clipper_options import NONE, Flags, choose, clippers, import_modules
from recipes.training.option_table import OPTIONS, Option, Options


def table(extra=()) -> dict[str, Option]:
    """All options by name: the fixed ones, the recipe's `extra` and the clippers'."""
    fixed = {o.name: o for o in (*OPTIONS, *extra)}
    fixed["clipper"] = dataclasses.replace(fixed["clipper"], choices=(*clippers(), NONE))
    flags = clipper_flags(extra)
    for name in flags.names():
        text = f"of --clipper {', '.join(flags.owners(name))}"
        fixed[name] = Option(
            name, flags.kind(name), None, text, "clipping", choices=flags.choices(name)
        )
    return fixed


def clipper_flags(extra=()) -> Flags:
    """The flags of all registered clippers, clear of the other options'."""
    return Flags.of([*(o.name for o in (*OPTIONS, *extra)), "import", "config", "help"])


def clipping_names(extra=()) -> set[str]:
    """The options that choose a clipper."""
    return {"clipper", "clip_config", *clipper_flags(extra).names()}


def build_parser(name: str, description: str, settings: Mapping, extra=()) -> Parser:
    """The command line of a recipe; what it does not give is absent from the namespace."""
    flags = clipper_flags(extra)
    chosen = settings.get("clipper", Options.clipper)
    epilog = flags.help(chosen, settings)
    parser = Parser(name, description, epilog=epilog, argument_default=argparse.SUPPRESS)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option in table(extra).values():
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        default = settings.get(option.name, option.default)
        text = option.help if default is None else f"{option.help} (default: {default})"
        text = text.replace("%", "%%")
        keywords: dict[str, Any] = {"help": text, "dest": option.name}
        if flags.owners(option.name):
            keywords["help"] = argparse.SUPPRESS  # the epilog has it under each clipper's name
        if option.kind is bool:
            keywords["action"] = argparse.BooleanOptionalAction
            groups[option.group].add_argument(option.flag, **keywords)
            continue
        keywords["metavar"] = "FILE" if option.kind is dict else option.name.upper()
        if option.choices:
            words = "{" + ",".join(option.choices) + "}"
            keywords |= {"choices": option.choices, "metavar": words}
        if option.kind in (int, float):
            keywords["type"] = option.kind
        if option.bare is not None:
            keywords |= {"nargs": "?", "const": option.bare}
        groups[option.group].add_argument(option.flag, **keywords)
    groups["run"].add_argument("--config", metavar="FILE", help="run a saved config.json again")
    return parser


@dataclasses.dataclass(frozen=True)
class Parsed:
    """A command line: what it gave itself, what its `--config` holds, and all options merged."""

    given: Mapping[str, Any]
    config: Mapping[str, Any]
    options: Options


def parse(recipe, argv=None) -> Parsed:
    """Reads a command line.

    Raises:
        RecipeError: anything wrong with the flags or the files that they name.
    """
    argv = sys.argv[1:] if argv is None else argv
    # First of all, and from the file too: which clippers, and so which flags, are there.
    early = Parser(recipe.name, None, add_help=False)
    early.add_argument("--import")
    early.add_argument("--config")
    first = vars(early.parse_known_args(argv)[0])
    import_modules(first["import"])
    config = read_config(first["config"], recipe) if first["config"] is not None else {}
    parser = build_parser(recipe.name, recipe.description, recipe.settings, recipe.extra_options)
    given = vars(parser.parse_args(argv))
    given.pop("config", None)
    if isinstance(given.get("clip_config"), str):
        given["clip_config"] = read_clip_config(given["clip_config"])
    return Parsed(given, config, resolve(recipe, config, given))


def resolve(recipe, config: Mapping, given: Mapping) -> Options:
    """Merges the recipe's settings, a config and explicit values; checks every one.

    Raises:
        RecipeError: unknown name, wrong type or value, or values of another clipper.
    """
    sources = (recipe.settings, config, given)
    for source in sources:
        import_modules(source.get("imports"))
    known = table(recipe.extra_options)
    for name, values in zip(
        (f"recipe {recipe.name}", "the options", "the options"), sources, strict=True
    ):
        for key in values:
            if key not in known:
                raise RecipeError(_unknown(key, known, name))
    merged = {name: option.default for name, option in known.items()}
    merged |= {name: value for source in sources for name, value in source.items()}
    merged = {name: known[name].check(value) for name, value in merged.items()}
    checked = [{name: known[name].check(v) for name, v in source.items()} for source in sources]
    flags = clipper_flags(recipe.extra_options)
    clipper, clip_config, clipping = choose(flags, checked, Options.clipper)
    merged |= {"clipper": clipper, "clip_config": clip_config}
    if not merged["activation_gate"]:
        for name in ("gate_clip_value", "gate_gamma"):
            if merged[name] is not None:
                raise RecipeError(f"{known[name].flag} needs --activation-gate")
    fixed: dict[str, Any] = {option.name: merged[option.name] for option in OPTIONS}
    extra = {option.name: merged[option.name] for option in recipe.extra_options}
    return Options(**fixed, clipping=clipping, extra=extra)


def read_json(path: str | os.PathLike) -> object:
    """The content of a JSON file.

    Raises:
        RecipeError: no such file, or not JSON; names the file and the line.
    """
    if not str(path):
        raise RecipeError(f"{path!r} is not the name of a file")
    try:
        return files.read_json(path)
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise RecipeError(str(error)) from None


def read_config(path: str | os.PathLike, recipe) -> dict:
    """The options in a saved `config.json`, checked.

    Raises:
        RecipeError: unreadable, of another recipe, an unknown key or a value of a wrong type.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: must hold an object of options, not {type(content).__name__}")
    content = dict(content)
    name = content.pop("recipe", recipe.name)
    if name != recipe.name:
        raise RecipeError(f"{path}: belongs to the recipe {name!r}, this is {recipe.name!r}")
    import_modules(content.get("imports"))
    known = table(recipe.extra_options)
    for key, value in content.items():
        if key not in known:
            raise RecipeError(_unknown(key, known, str(path)))
        try:
            known[key].check(value)
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from None
    return content


def read_clip_config(path: str | os.PathLike) -> dict:
    """A serialised clipper from a file, or from under the key "clipper" of its top level."""
    content = read_json(path)
    if isinstance(content, dict) and isinstance(content.get("clipper"), dict):
        content = content["clipper"]
    if not isinstance(content, dict) or "class_name" not in content:
        raise RecipeError(f"{path}: holds no serialised clipper (an object with 'class_name')")
    return content


def saved_options(recipe, options: Options) -> dict:
    """What `config.json` holds: the recipe's name and every option that makes the run."""
    saved = [o for o in (*OPTIONS, *recipe.extra_options) if o.saved]
    return {
        "recipe": recipe.name,
        **{option.name: getattr(options, option.name) for option in saved},
        **clipper_flags(recipe.extra_options).values(options.clipper, options.clipping),
    }


def as_words(recipe, values: Mapping) -> list[str]:
    """The command line that gives these values, those that are None left out."""
    known, words = table(recipe.extra_options), []
    for name, value in values.items():
        flag = known[name].flag
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif value is not None:
            words += [flag, str(value)]
    return words


def _unknown(name: str, known, source: str) -> str:
    return f"{source}: unknown option {name!r}{did_you_mean(name, known)}"
