"""The options of a run: one table of flags, keys of `config.json` and a recipe's settings.

A value comes from, in rising order: the table, the recipe's `settings`, `--config FILE`, the
command line. A clipper's options come from its declaration in keras_gradclip. Nothing here imports
Keras, except for the clippers of `--import`.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import math
import os
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recipes.command_line import Parser, import_tensorflow
from recipes.errors import RecipeError
from recipes.plugin import command_line, declarations, files

NONE = "none"
_LARGEST = 2**31 - 1  # what TensorFlow counts elements with
_FLOAT32 = (2.0**-126, 2.0**128 - 2.0**104)  # the normal numbers, in which weights are computed
# Options without an effect unless another one has a value.
_NEEDS = {"momentum": ("optimizer", "sgd"), "worker_timeout": ("strategy", "multiworker")}


def flag_of(name: str) -> str:
    """`--max-norm` for `max_norm`."""
    return "--" + name.replace("_", "-")


# --------------------------------------------------------------------------------------- the table


@dataclasses.dataclass(frozen=True)
class Option:
    """One option: `--some-name VALUE` on the command line, `"some_name": value` in a config.

    Attributes:
        name: str, with underscores.
        kind: type of the value: int, float, str, bool, or dict (a JSON file on the command line).
        default: the value if none is given; None: the library's default, or not used.
        help: str.
        group: str, heading in `--help`.
        choices: allowed words, or ().
        low, high: bounds of a number, inclusive.
        above: exclusive lower bound of a number.
        saved: bool, whether `config.json` has it; False for options such as the output folder.
        bare: value of the flag without an argument, or None if it needs one.
        flag: str, the name as on the command line.
    """

    name: str
    kind: type
    default: object
    help: str
    group: str = "training"
    choices: tuple = ()
    low: float | None = None
    high: float | None = None
    above: float | None = None
    saved: bool = True
    bare: object = None
    flag: str = ""

    def __post_init__(self):
        object.__setattr__(self, "flag", self.flag or flag_of(self.name))

    def check(self, value: Any) -> Any:
        """The value, an int widened to float where a float is due.

        Raises:
            RecipeError: wrong type, not among the choices, or out of bounds.
        """
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        due = "" if value is None and self.default is None else self._due(value)
        if due:
            raise RecipeError(f"{self.flag} {json.dumps(value, default=str)}: must be {due}")
        return value

    def _due(self, value: Any) -> str:
        """What an invalid value should have been, or ""."""
        if not isinstance(value, self.kind) or (self.kind is int and isinstance(value, bool)):
            return f"a value of type {self.kind.__name__}"
        if self.choices:
            return "" if value in self.choices else f"one of {', '.join(self.choices)}"
        if value == "":
            return "a name of one character or more"
        if self.kind is bool or not isinstance(value, (int, float)):
            return ""
        high = _LARGEST if self.high is None and self.kind is int else self.high
        if not math.isfinite(value):
            return "a finite number"
        if self.low is not None and value < self.low:
            return f"{self.low:g} or more"
        if high is not None and value > high:
            return f"{high:.10g} or less"
        if self.above is not None and value <= self.above:
            return f"more than {self.above:g}"
        if self.kind is float and value and not _FLOAT32[0] <= abs(value) <= _FLOAT32[1]:
            return f"within the range of float32, {_FLOAT32[0]:.3g} to {_FLOAT32[1]:.3g}"
        return ""

    def add_to(self, group: argparse._ArgumentGroup, default: object) -> None:
        """Adds the flag, with `default` in its help."""
        text = self.help.replace("%", "%%")
        if default is not None and default is not False:
            text += f" (default: {default})"
        keywords: dict[str, Any] = {"help": text, "dest": self.name}
        if self.kind is bool:
            group.add_argument(self.flag, action=argparse.BooleanOptionalAction, **keywords)
            return
        keywords["metavar"] = "FILE" if self.kind is dict else self.name.upper()
        if self.choices:
            words = "{" + ",".join(self.choices) + "}"
            keywords |= {"choices": self.choices, "metavar": words}
        if self.kind in (int, float):
            keywords["type"] = self.kind
        if self.bare is not None:
            keywords |= {"nargs": "?", "const": self.bare}
        group.add_argument(self.flag, **keywords)


def option(default: object, help: str, **more: Any) -> Any:
    """A field of `Options`; the arguments are those of `Option`.

    Without a `group` the field has the one of the field before it.
    """
    return dataclasses.field(default=default, metadata={"help": help, **more})


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of a run: the table below, the clipper's values, and the recipe's own.

    Attributes:
        clipping: values of the chosen clipper's parameters, by name; its defaults are left out.
        extra: values of the recipe's `extra_options`, which are attributes too.
        saved: the content of `config.json`: the recipe's name and all options that affect the run.
    """

    clipper: str = option("absolute", "the clipping rule", group="clipping")
    clip_config: dict | None = option(None, "JSON file of a serialised clipper, as best.json")
    imports: str | None = option(None, "modules with custom clippers, a,b,c", flag="--import")
    activation_gate: bool = option(False, "gate the gradient at large activations")
    gate_clip_value: float | None = option(None, "activation gate: c", above=0)
    gate_gamma: float | None = option(None, "activation gate: factor beyond the gate", above=0)
    optimizer: str = option(
        "adamw",
        "the optimizer of the clipped gradients (plain sgd is advised against)",
        choices=("adamw", "adam", "sgd", "rmsprop", "lion", "adafactor", "nadam"),
        group="training",
    )
    learning_rate: float = option(0.001, "peak learning rate, after the warm-up", above=0)
    warmup_epochs: float = option(1.0, "epochs of linear warm-up, before the cosine", low=0)
    momentum: float = option(0.0, "momentum of sgd", low=0, high=1)
    weight_decay: float = option(0.0, "decoupled; not on biases and norms", low=0)
    label_smoothing: float = option(0.0, "mass moved to the other classes", low=0, high=0.99)
    epochs: int = option(10, "passes over the training split", low=1)
    batch_size: int = option(64, "global batch, over all devices", low=1)
    accumulate: int = option(1, "micro-batches added up before an update", low=1)
    skip_nonfinite: bool = option(False, "skip updates whose gradients are not finite")
    seed: int = option(0, "order, augmentation, initial weights and dropout", low=0, high=2**32 - 1)
    limit_steps: int | None = option(None, "most batches per epoch and per evaluation", low=1)
    select_best: str = option(
        "improve",
        "the epoch kept: improve, the best in validation; last; beats-test, the last that scores "
        "higher in validation than in test, which chooses by looking at the test set",
        choices=("improve", "last", "beats-test"),
    )
    dataset: str = option("mnist_embedded", "a TFDS name, or image_folder", group="data")
    data_dir: str | None = option(
        None, "folder of the prepared data set; of image_folder: CLASS/FILE, or train/CLASS/FILE"
    )
    splits: str | None = option(None, "train,validation,test in TFDS's slicing language")
    download: bool = option(False, "let TFDS download and prepare the data set")
    image_size: int = option(224, "side of the images in pixels", low=8, high=16_384)
    augment: str = option(
        "auto",
        "imagenet: random crop in scale and aspect; shift: by up to an eighth",
        choices=("auto", "imagenet", "shift", "none"),
    )
    flip: bool | None = option(None, "mirror half of the training images")
    on_bad_data: str = option(
        "refuse", "unreadable files and rows: stop, or report them", choices=("refuse", "skip")
    )
    mixed_precision: str = option(
        "none",
        "compute in 16 bits",
        choices=("none", "float16", "bfloat16"),
        bare="float16",
        group="machine",
    )
    jit: bool = option(False, "compile the step with XLA")
    deterministic: bool = option(False, "reproducible kernels on a GPU, which are slower")
    devices: int = option(1, "GPUs (of each worker), or logical CPU devices", low=1, high=1024)
    strategy: str = option(
        "auto",
        "auto: mirrored on several devices; multiworker: several machines (docs/cluster.md)",
        choices=("auto", "none", "mirrored", "multiworker"),
    )
    worker_timeout: int = option(600, "multiworker: seconds to wait for a worker", low=1)
    output: str | None = option(None, "results (default: runs/NAME)", saved=False, group="run")
    resume: bool = option(False, "resume the run in the output folder", saved=False)
    backup_every: int = option(500, "steps between backups; one more each epoch", low=1)
    keep_backup: bool = option(False, "keep the backup, to --resume with more epochs after the end")
    tensorboard: bool = option(True, "write TensorBoard logs")
    monitor: int = option(0, "measure every Nth update, for monitor/report.html; 0: off", low=0)
    verbose: str = option(
        "auto",
        "line: a line per epoch; bar: a progress bar, too (auto: in a terminal); quiet: neither",
        choices=("auto", "bar", "line", "quiet"),
        saved=False,
    )
    traceback: bool = option(False, "errors with their traceback", saved=False)
    clipping: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    saved: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    if not TYPE_CHECKING:

        def __getattr__(self, name):
            for values in (self.__dict__.get("extra", {}), self.__dict__.get("clipping", {})):
                if name in values:
                    return values[name]
            raise AttributeError(f"no option is called {name!r} here")


def _fixed_options() -> tuple[Option, ...]:
    hints, result = typing.get_type_hints(Options), []
    more: dict[str, Any] = {}
    for field in dataclasses.fields(Options):
        if field.metadata:
            more = {"group": more.get("group"), **field.metadata}  # else the one before's
            kinds = [k for k in typing.get_args(hints[field.name]) if k is not type(None)]
            kind = kinds[0] if kinds else hints[field.name]
            result.append(Option(field.name, kind, field.default, **more))
    return tuple(result)


OPTIONS = _fixed_options()


def by_name(extra: Iterable[Option] = ()) -> dict[str, Option]:
    """All options by name, the recipe's included, except clippers' parameters."""
    options = {o.name: o for o in (*OPTIONS, *extra)}
    choices = (*clippers(), NONE)
    return options | {"clipper": dataclasses.replace(options["clipper"], choices=choices)}


# ------------------------------------------------------------------------------------ the clippers


def clippers() -> dict[str, declarations.Declaration]:
    """The available clippers by name; custom ones too, once Keras is imported."""
    if "keras_gradclip.clippers" not in sys.modules:
        return declarations.declared()
    from keras_gradclip.clippers import cards

    return cards.declarations()


def clipper_flags(extra: Iterable[Option] = ()) -> declarations.Flags:
    """The flags of all clippers, renamed where they clash with other options."""
    names = [o.name for o in (*OPTIONS, *extra)]
    return declarations.flags_of(clippers(), [*names, "import", "config", "help", "help_clippers"])


def clipping_names(extra: Iterable[Option] = ()) -> set[str]:
    """The names of all options about the clipper."""
    flags = clipper_flags(extra).values()
    return {"clipper", "clip_config", *(name for names in flags for name in names)}


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


def _of_clipper(flags: declarations.Flags, clipper: str, values: Mapping) -> dict[str, Any]:
    """Checked values by parameter, from values by flag."""
    known, result = flags.get(clipper, {}), {}
    for flag, value in values.items():
        if flag not in known:
            owners = " or ".join(alias for alias, names in flags.items() if flag in names)
            raise RecipeError(f"{flag_of(flag)} belongs to --clipper {owners}, not to {clipper!r}")
        try:
            result[known[flag].name] = known[flag].check(clippers()[clipper].name, value)
        except ValueError as error:
            raise RecipeError(f"{flag_of(flag)} {value}: {error}") from None
    return result


def _choose(
    flags: declarations.Flags, sources: Sequence[Mapping[str, Any]]
) -> tuple[str, dict | None, dict[str, Any]]:
    """The clipper of a run: its name, the serialised clipper or None, its parameters' values.

    `sources` are in rising order of priority; the last is the command line. One that names another
    clipper discards the parameters of the sources before it, so that a recipe's threshold is not
    used for another clipper.
    """
    clipper, serialised = Options.clipper, None
    values: dict[str, Any] = {}
    for own in sources:
        if "clip_config" in own:
            clash = [name for name in own if name != "clip_config" and own[name] != NONE]
            clash += ["clipper"] * (own is sources[-1] and "clipper" in own)
            if clash:
                raise RecipeError(
                    f"{flag_of(clash[0])} and --clip-config: give one of them, not both"
                )
            clipper, serialised, values = NONE, own["clip_config"], {}
        elif own:
            before, clipper = clipper, own.get("clipper", clipper)
            kept = values if clipper == before else {}
            values = kept | {n: v for n, v in own.items() if n != "clipper"}
            serialised = None
    return clipper, serialised, _of_clipper(flags, clipper, values)


# ------------------------------------------------------------------------------- from flags, files


@dataclasses.dataclass(frozen=True)
class Parsed:
    """A parsed command line: its own values, those of its `--config`, and all options merged."""

    given: Mapping[str, Any]
    config: Mapping[str, Any]
    options: Options


def build_parser(recipe, clipper: str, program: str) -> Parser:
    """The command line of a recipe; a value that is not given is absent from the namespace."""
    examples = [program, f"{program} --clipper norm --max-norm 1 --epochs 3", f"{program} --resume"]
    parser = Parser(program, recipe.description, examples, argument_default=argparse.SUPPRESS)
    flags = clipper_flags(recipe.extra_options)
    parser.add_clippers(clippers(), flags, clipper, recipe.settings)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option in by_name(recipe.extra_options).values():
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        option.add_to(groups[option.group], recipe.settings.get(option.name, option.default))
    groups["run"].add_argument("--config", metavar="FILE", help="run a saved config.json again")
    return parser


def parse(recipe, argv: Sequence[str], beside: Iterable[str] = ()) -> Parsed:
    """Reads a command line.

    Args:
        recipe: `Recipe`.
        argv: the words after the program.
        beside: more flags to suggest for a misspelt one, of a command that passes on the rest.

    Raises:
        RecipeError: anything wrong with the flags or the files that they name.
    """
    # The flags depend on these three.
    early = command_line.early(argv, "--import", "--config", "--clipper")
    first = {name: values[-1] for name, values in early.items() if values}
    for names in (recipe.settings.get("imports"), first.get("import")):
        import_modules(names)
    with _about("--config"):
        config = read_config(first["config"], recipe) if "config" in first else {}
    clipper = first.get("clipper") or {**recipe.settings, **config}.get("clipper", Options.clipper)
    program = f"python {sys.argv[0]}" if sys.argv[0].endswith(".py") else recipe.name
    parser = build_parser(recipe, str(clipper), program)
    found, rest = parser.parse_known_args(argv)
    flags = clipper_flags(recipe.extra_options)
    for word in rest:  # the flag of another clipper
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and any(name in names for names in flags.values()):
            if "--resume" in argv and "clipper" not in first:
                raise RecipeError(f"{flag_of(name)}: give --clipper, too, or neither to --resume")
            _of_clipper(flags, str(clipper), {name: None})
    if rest:
        parser.refuse(rest, beside)
    given = vars(found)
    given.pop("config", None)
    if isinstance(given.get("clip_config"), str):
        with _about("--clip-config"):
            given["clip_config"] = read_clip_config(given["clip_config"])
    options = resolve(recipe, config, given)
    for name, (other, value) in _NEEDS.items() if not options.resume else ():
        is_set = given.get(name, getattr(Options, name)) != getattr(Options, name)
        if is_set and getattr(options, other) != value:
            raise RecipeError(f"{flag_of(name)} needs {flag_of(other)} {value}")
    return Parsed(given, config, options)


@contextlib.contextmanager
def _about(flag: str) -> Iterator[None]:
    """Puts a flag before the message of a `RecipeError`, which begins with the flag's value."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError(f"{flag} {error}") from None


def resolve(recipe, config: Mapping, given: Mapping) -> Options:
    """Merges the recipe's settings, a config and explicit values; checks every one.

    Raises:
        RecipeError: unknown name, wrong type or value, or values that contradict each other.
    """
    sources = (recipe.settings, config, given)
    for source in sources:
        import_modules(source.get("imports"))
    clipping = clipping_names(recipe.extra_options)
    values = {option.name: option.default for option in (*OPTIONS, *recipe.extra_options)}
    for source, origin in zip(sources, (f"recipe {recipe.name}: ", "", ""), strict=True):
        values |= _checked(source, recipe, origin)
    chosen = [{n: v for n, v in s.items() if n in clipping and v is not None} for s in sources]
    flags = clipper_flags(recipe.extra_options)
    values["clipper"], values["clip_config"], settings = _choose(flags, chosen)
    _check_together(values)
    fixed, extra = (
        {option.name: values[option.name] for option in options}
        for options in (OPTIONS, recipe.extra_options)
    )
    saved = {
        "recipe": recipe.name,
        **{o.name: values[o.name] for o in (*OPTIONS, *recipe.extra_options) if o.saved},
        **{
            flag: settings[parameter.name]
            for flag, parameter in flags.get(values["clipper"], {}).items()
            if parameter.name in settings
        },
    }
    return Options(**fixed, clipping=settings, extra=extra, saved=saved)


def _checked(source: Mapping, recipe, origin: str = "") -> dict[str, Any]:
    """The checked values in a source, except those of clippers' parameters."""
    known, clipping = by_name(recipe.extra_options), clipping_names(recipe.extra_options)
    for name in source:
        if name not in known and name not in clipping:
            near = command_line.did_you_mean(name, [*known, *clipping])
            raise RecipeError(f"{origin}unknown option {name!r}{near}")
    return {name: known[name].check(v) for name, v in source.items() if name in known}


def _check_together(values: Mapping[str, Any]) -> None:
    """Checks that options do not contradict each other."""
    for name in ("gate_clip_value", "gate_gamma"):
        if values[name] is not None and not (values["activation_gate"] or values["resume"]):
            raise RecipeError(f"{flag_of(name)} needs --activation-gate")
    devices, batch, strategy = (values[n] for n in ("devices", "batch_size", "strategy"))
    if batch % devices and strategy != "multiworker":
        raise RecipeError(f"--batch-size {batch} is not divisible by --devices {devices}")
    if strategy == "none" and devices > 1:
        raise RecipeError(f"--devices {devices} needs --strategy mirrored, not none")


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
    try:
        _checked(content, recipe)
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


def with_defaults(recipe, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Saved options, with the defaults of their clipper's parameters."""
    flags = clipper_flags(recipe.extra_options).get(str(saved.get("clipper")), {})
    return {**{flag: parameter.default for flag, parameter in flags.items()}, **saved}


def as_words(recipe, values: Mapping) -> list[str]:
    """The flags for these values, without those that are None."""
    known, words = by_name(recipe.extra_options), []
    for name, value in values.items():
        flag = known[name].flag if name in known else flag_of(name)
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif value is not None:
            words += [flag, str(value)]
    return words
