"""The options of a recipe: one table for flags, `config.json` and the recipes' own settings.

A value comes from, in rising order: the table, the recipe's `settings`, `--config FILE`, the
command line. All of them pass the same checks.
"""

import argparse
import dataclasses
import difflib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from recipes.errors import RecipeError


@dataclasses.dataclass(frozen=True)
class Option:
    """One option: `--some-name VALUE` on the command line, `"some_name": value` in a config.

    Attributes:
        name: str, with underscores.
        kind: type of the value: int, float, str, bool, or dict (a JSON file on the command line).
        default: the value where nobody gives one; None: left to the library or not in use.
        help: str.
        group: str, heading in `--help`.
        choices: allowed words, or ().
        low, high: bounds of a number, inclusive.
        above: exclusive lower bound of a number.
        saved: bool, False for what does not belong to the run itself (where it is written ...).
        bare: value of the flag without an argument, or None where it needs one.
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

    @property
    def flag(self) -> str:
        """The name as on the command line."""
        return "--" + self.name.replace("_", "-")

    def check(self, value):
        """The value, an int widened to float where a float is due.

        Raises:
            RecipeError: wrong type, not among the choices, or out of bounds.
        """
        if value is None:
            if self.default is None:
                return None
            raise self._wrong(value, f"a value of type {self.kind.__name__}")
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if (self.kind is int and isinstance(value, bool)) or not isinstance(value, self.kind):
            raise self._wrong(value, f"a value of type {self.kind.__name__}")
        if self.choices and value not in self.choices:
            raise self._wrong(value, f"one of {', '.join(self.choices)}")
        if self.kind in (int, float):
            if not math.isfinite(value):
                raise self._wrong(value, "a finite number")
            if self.low is not None and value < self.low:
                raise self._wrong(value, f"{self.low:g} or more")
            if self.high is not None and value > self.high:
                raise self._wrong(value, f"{self.high:g} or less")
            if self.above is not None and value <= self.above:
                raise self._wrong(value, f"more than {self.above:g}")
        return value

    def _wrong(self, value, wanted: str) -> RecipeError:
        return RecipeError(f"{self.flag} {json.dumps(value, default=str)}: must be {wanted}")


CLIPPERS = ("absolute", "exponential", "norm", "none")
# The thresholds that belong to each clipper.
CLIPPER_SETTINGS = {
    "absolute": ("threshold", "rescale"),
    "exponential": ("beta", "gamma", "weight", "rescale"),
    "norm": ("max_norm", "scope", "rescale"),
    "none": (),
}

OPTIONS = (
    # clipping
    Option("clipper", str, "absolute", "the clipping rule", "clipping", choices=CLIPPERS),
    Option("threshold", float, None, "absolute: c, in 0..1", "clipping"),
    Option("beta", float, None, "exponential: slope over the weights, 0.5 to 1", "clipping"),
    Option("gamma", float, None, "exponential: factor", "clipping"),
    Option(
        "weight",
        str,
        None,
        "exponential: which weight the threshold follows",
        "clipping",
        choices=("elementwise", "rms", "none"),
    ),
    Option("max_norm", float, None, "norm: largest L2 norm", "clipping"),
    Option(
        "scope",
        str,
        None,
        "norm: what one norm is taken over",
        "clipping",
        choices=("layer", "variable", "global"),
    ),
    Option(
        "rescale",
        str,
        None,
        "restore the gradient's size after the clip (alpha: exponential only)",
        "clipping",
        choices=("norm", "max", "alpha"),
    ),
    Option(
        "clip_config",
        dict,
        None,
        "JSON of a serialised clipper, also under a key 'clipper' as the tuner's best.json has it",
        "clipping",
    ),
    Option("activation_gate", bool, False, "gate the gradient at large activations", "clipping"),
    Option("gate_clip_value", float, None, "activation gate: c", "clipping"),
    Option("gate_gamma", float, None, "activation gate: factor beyond the gate", "clipping"),
    # training
    Option(
        "optimizer",
        str,
        "adamw",
        "the optimizer that receives the clipped gradients (plain sgd is advised against)",
        choices=("adamw", "adam", "sgd", "rmsprop", "lion", "adafactor", "nadam"),
    ),
    Option("learning_rate", float, 1e-3, "peak learning rate, after the warm-up", above=0),
    Option("warmup_epochs", float, 1.0, "epochs of linear warm-up, before the cosine", low=0),
    Option("momentum", float, 0.0, "momentum of sgd", low=0, high=1),
    Option("weight_decay", float, 0.0, "decoupled; not on biases and norms", low=0),
    Option("label_smoothing", float, 0.0, "mass moved to the other classes", low=0, high=0.99),
    Option("epochs", int, 10, "passes over the training split", low=1),
    Option("batch_size", int, 64, "global batch, over all devices", low=1),
    Option("accumulate", int, 1, "micro-batches added up before an update", low=1),
    Option("skip_nonfinite", bool, False, "skip updates whose gradients are not finite"),
    Option("seed", int, 0, "order, augmentation, initial weights and dropout", low=0),
    Option(
        "limit_steps", int, None, "at most so many batches an epoch and in each evaluation", low=1
    ),
    Option(
        "select_best",
        str,
        "improve",
        "which model is kept: improve, when validation gets better; beats-test, when validation "
        "accuracy exceeds test accuracy, which is not the default because it chooses by looking "
        "at the test set, so that the test set no longer measures anything",
        choices=("improve", "beats-test"),
    ),
    # data
    Option("dataset", str, "mnist_embedded", "a TFDS name, or image_folder", "data"),
    Option("data_dir", str, None, "folder of the prepared data set", "data"),
    Option("splits", str, None, "train,validation,test in TFDS's slicing language", "data"),
    Option("download", bool, False, "let TFDS download and prepare the data set", "data"),
    Option("image_size", int, 224, "side of the images in pixels", "data", low=8),
    Option(
        "augment",
        str,
        "auto",
        "imagenet: random crop in scale and aspect; shift: by up to an eighth",
        "data",
        choices=("auto", "imagenet", "shift", "none"),
    ),
    Option("flip", bool, None, "mirror half of the training images", "data"),
    Option(
        "on_bad_data",
        str,
        "refuse",
        "an unreadable file or row, always reported: stop, or go on without it",
        "data",
        choices=("refuse", "skip"),
    ),
    # machine
    Option(
        "mixed_precision",
        str,
        "none",
        "compute in 16 bits",
        "machine",
        choices=("none", "float16", "bfloat16"),
        bare="float16",
    ),
    Option("jit", bool, False, "compile the step with XLA", "machine"),
    Option(
        "deterministic",
        bool,
        False,
        "kernels that compute the same twice on a GPU too, at some cost; CPUs do without it",
        "machine",
    ),
    Option(
        "devices",
        int,
        1,
        "GPUs (of each worker), or logical CPU devices where there are none",
        "machine",
        low=1,
    ),
    Option(
        "strategy",
        str,
        "auto",
        "auto: mirrored on more than one device; multiworker: several machines, as TF_CONFIG "
        "says (see CLUSTER.md)",
        "machine",
        choices=("auto", "none", "mirrored", "multiworker"),
    ),
    Option(
        "worker_timeout",
        int,
        600,
        "multiworker: seconds to wait for a worker before giving up",
        "machine",
        low=1,
    ),
    # the run
    Option("output", str, None, "folder of the results (default: runs/NAME)", "run", saved=False),
    Option("resume", bool, False, "go on with the run in the output folder", "run", saved=False),
    Option("backup_every", int, 500, "steps between backups; one more each epoch", "run", low=1),
    Option("tensorboard", bool, True, "write TensorBoard logs", "run"),
    Option(
        "monitor",
        int,
        0,
        "measure each variable's gradient every N updates and write monitor/report.html; 0: off",
        "run",
        low=0,
    ),
    Option(
        "verbose",
        str,
        "auto",
        "progress bar, one line an epoch, or nothing",
        "run",
        choices=("auto", "bar", "line", "quiet"),
        saved=False,
    ),
    Option("traceback", bool, False, "errors with their traceback", "run", saved=False),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise RecipeError(f"{message} (see --help)")


def table(extra=()) -> dict[str, Option]:
    """All options by name."""
    return {option.name: option for option in (*OPTIONS, *extra)}


def build_parser(name: str, description: str, settings: Mapping, extra=()) -> _Parser:
    """The command line of a recipe; what is not given is absent from the namespace."""
    parser = _Parser(
        prog=name,
        description=description,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option in table(extra).values():
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        default = settings.get(option.name, option.default)
        text = option.help if default is None else f"{option.help} (default: {default})"
        text = text.replace("%", "%%")
        if option.kind is bool:
            groups[option.group].add_argument(
                option.flag, action=argparse.BooleanOptionalAction, help=text
            )
            continue
        keywords = {"help": text, "metavar": option.name.upper()}
        if option.choices:
            keywords |= {"choices": option.choices, "metavar": "{" + ",".join(option.choices) + "}"}
        if option.kind in (int, float):
            keywords["type"] = option.kind
        if option.bare is not None:
            keywords |= {"nargs": "?", "const": option.bare}
        if option.kind is dict:
            keywords["metavar"] = "FILE"
        groups[option.group].add_argument(option.flag, **keywords)
    groups["run"].add_argument("--config", metavar="FILE", help="run a saved config.json again")
    return parser


@dataclasses.dataclass(frozen=True)
class Parsed:
    """A command line: what it gave itself, what its `--config` holds, and all options merged."""

    given: Mapping[str, object]
    config: Mapping[str, object]
    options: argparse.Namespace


def parse(recipe, argv=None) -> Parsed:
    """Reads a command line.

    Raises:
        RecipeError: anything wrong with the flags or the files that they name.
    """
    parser = build_parser(recipe.name, recipe.description, recipe.settings, recipe.extra_options)
    given = vars(parser.parse_args(sys.argv[1:] if argv is None else argv))
    path = given.pop("config", None)
    config = read_config(path, recipe) if path else {}
    if isinstance(given.get("clip_config"), str):
        given["clip_config"] = read_clip_config(given["clip_config"])
    return Parsed(given, config, resolve(recipe, config, given))


def resolve(recipe, config: Mapping, given: Mapping) -> argparse.Namespace:
    """Merges the recipe's settings, a config and explicit values; checks every one.

    Raises:
        RecipeError: unknown name, wrong type or value, or thresholds of another clipper.
    """
    known = table(recipe.extra_options)
    for source, values in ((f"recipe {recipe.name}", recipe.settings), ("", config), ("", given)):
        for name in values:
            if name not in known:
                raise RecipeError(_unknown(name, known, source or "the options"))
    values = {name: option.default for name, option in known.items()}
    values |= {**recipe.settings, **config, **given}
    values = {name: known[name].check(value) for name, value in values.items()}
    _settle_clipper(values, given)
    if not values["activation_gate"]:
        for name in ("gate_clip_value", "gate_gamma"):
            if values[name] is not None:
                raise RecipeError(f"{known[name].flag} needs --activation-gate")
    return argparse.Namespace(**values)


def _settle_clipper(values: dict, given: Mapping) -> None:
    all_settings = {name for names in CLIPPER_SETTINGS.values() for name in names}
    explicit = sorted(name for name in all_settings if given.get(name) is not None)
    if given.get("clip_config") is not None:
        clash = [name for name in ("clipper", *explicit) if given.get(name) is not None]
        if clash:
            flag = clash[0].replace("_", "-")
            raise RecipeError(f"--{flag} and --clip-config: give one of them, not both")
    elif given.get("clipper") is not None or explicit:
        values["clip_config"] = None  # the command line overrides a config's
    if values["clip_config"] is not None:
        belonging: tuple = ()
        values["clipper"] = "none"
    else:
        belonging = CLIPPER_SETTINGS[values["clipper"]]
    for name in sorted(all_settings - set(belonging)):
        if given.get(name) is not None:
            owners = [c for c, names in CLIPPER_SETTINGS.items() if name in names]
            raise RecipeError(
                f"--{name.replace('_', '-')} belongs to --clipper {' or '.join(owners)}, "
                f"not to {values['clipper']!r}"
            )
        values[name] = None  # a recipe's threshold does not outlive its clipper


def read_json(path: str | os.PathLike) -> object:
    """The content of a JSON file.

    Raises:
        RecipeError: no such file, or not JSON; names the file and the line.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise RecipeError(f"{path}{line}: not JSON ({error})") from None


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


def saved_options(recipe, options: argparse.Namespace) -> dict:
    """What `config.json` holds: the recipe's name and every option that makes the run."""
    known = table(recipe.extra_options)
    return {
        "recipe": recipe.name,
        **{name: getattr(options, name) for name, option in known.items() if option.saved},
    }


def write_json(path: str | os.PathLike, content: object) -> None:
    """Writes a JSON file whole or not at all."""
    replace_file(
        path, lambda scratch: Path(scratch).write_text(json.dumps(content, indent=2) + "\n")
    )


def replace_file(path: str | os.PathLike, write: Callable[[str], object]) -> None:
    """Calls `write(scratch)` on a name beside `path`, then moves the file into its place.

    A crash, a full disk or a kill leaves the file that was there before. The scratch name keeps
    the suffix, which writers choose their format by.
    """
    path = Path(path)
    scratch = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        write(str(scratch))
        with open(scratch, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _unknown(name: str, known, source: str) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f", did you mean {close[0]!r}?" if close else ""
    return f"{source}: unknown option {name!r}{hint}"
