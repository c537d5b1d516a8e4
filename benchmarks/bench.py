"""What clipping costs, against Keras's own clipping, optax, PyTorch, timm and a plain copy.

    make bench                                   # everything: about half an hour
    python benchmarks/bench.py --only clip update

Every contestant is run in turn, A B C A B C, each framework in a process of its own, so that a
busy machine hurts all alike. A ratio is taken within each round and the table gives the median of
the ratios with their quartiles; absolute times only mean something beside each other. Writes
runs/bench/bench.csv and, for the ratios of a clip, runs/bench/bench.png.
"""

import argparse
import contextlib
import csv
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PYTHONS = {
    "tensorflow": sys.executable,
    "jax": str(ROOT / ".venv-jax/bin/python"),
    "torch": str(ROOT / ".venv-torch/bin/python"),
}
PARTS = (
    *("clip", "update", "compiled", "step", "monitor", "first-step", "memory"),
    *("operations", "growth", "reductions", "devices", "processes"),
)
STEP_SETS = ("SGD/64", "SGD/8", "Adam/64", "Adam/8")
FIELDS = ("part", "set", "contestant", "against", "unit", "median", "low", "high", "samples")
Row = dict[str, Any]

#: (part, set, contestant, against, at most): what this library wants to reach.
TARGETS = [
    ("clip", "resnet50", "AbsoluteClip", "copy", 1.1),
    ("clip", "resnet50", "NormClip variable", "copy", 1.3),
    ("clip", "resnet50", "NormClip layer", "copy", 1.3),
    ("clip", "resnet50", "NormClip global", "copy", 1.3),
    ("clip", "resnet50", "ExponentialClip", "AbsoluteClip", 1.5),
    ("update", "resnet50", "AbsoluteClip", "Keras clipvalue", 0.9),
    ("update", "resnet50", "NormClip variable", "Keras clipnorm", 0.8),
    ("update", "resnet50", "NormClip layer", "Keras clipnorm", 0.8),
    ("update", "resnet50", "NormClip global", "Keras global_clipnorm", 0.8),
    ("compiled", "resnet50", "SGD, AbsoluteClip", "SGD", 0.75),
    ("compiled", "resnet50", "SGD, AbsoluteClip", "SGD, clipvalue", 0.55),
    ("compiled", "resnet50", "Adam, AbsoluteClip", "Adam", 0.58),
    ("compiled", "resnet50", "AdamW, AbsoluteClip", "AdamW", 0.58),
    ("compiled", "resnet50", "Adam, NormClip layer", "Adam", 0.75),
    ("compiled", "resnet50", "Adam, NormClip global", "Adam", 0.75),
    ("compiled", "resnet50", "SGD, NormClip layer", "SGD", 1.0),
    ("compiled", "resnet50", "SGD, NormClip global", "SGD", 1.0),
    ("compiled", "resnet50", "SGD, ExponentialClip", "SGD, AbsoluteClip", 1.1),
    ("compiled", "resnet50", "Adam, ExponentialClip", "Adam, AbsoluteClip", 1.1),
    ("compiled", "resnet50", "SGD, AdaptiveClip", "SGD", 1.1),
    ("step", "resnet50, SGD, batch 64", "AbsoluteClip", "no clip", 1.0),
    ("step", "resnet50, Adam, batch 64", "AbsoluteClip", "no clip", 0.97),
    ("step", "resnet50, SGD, batch 8", "AbsoluteClip", "no clip", 0.95),
    ("step", "resnet50, Adam, batch 8", "AbsoluteClip", "no clip", 0.88),
    *(
        ("step", f"resnet50, {inner}, batch 64", f"NormClip {scope}", "no clip", 1.0)
        for inner in ("SGD", "Adam")
        for scope in ("layer", "global")
    ),
    ("monitor", "resnet50", "NormClip layer, ClipMonitor", "no clip", 1.02),
    ("first-step", "resnet50", "AbsoluteClip", "no clip", 1.15),
    ("first-step", "resnet50", "NormClip layer", "no clip", 1.15),
    ("first-step", "resnet50", "NormClip global", "no clip", 1.15),
    ("memory", "resnet50", "AbsoluteClip", "no clip", 1.02),
    ("memory", "resnet50", "NormClip layer", "no clip", 1.02),
    ("operations: clip", "resnet50", "AbsoluteClip", "a tensor", 2.0),
    ("growth: trace", "exponent", "AbsoluteClip", "variables", 1.1),
    ("growth: trace", "exponent", "NormClip layer", "variables", 1.1),
    ("growth: run", "exponent", "AbsoluteClip", "variables", 1.1),
    ("growth: run", "exponent", "NormClip layer", "variables", 1.1),
]


class Worker:
    """A framework's process: see `worker.py`."""

    def __init__(self, framework: str, **variables: str) -> None:
        self.framework = framework
        environment = {
            # Threads that wait must not spin: the next contestant needs the core.
            **{"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "TF_CPP_MIN_LOG_LEVEL": "3"},
            **os.environ,
            **variables,
            "CUDA_VISIBLE_DEVICES": "-1",
        }
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self.process = subprocess.Popen(
            [PYTHONS[framework], str(HERE / "worker.py"), framework],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
        )

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        """Send one order and wait for its answer.

        Raises:
            RuntimeError: the process ended; with what it wrote last.
        """
        self.send(do, **order)
        return self.answer()

    def send(self, do: str, **order: Any) -> None:
        """Send one order."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `answer` says why
            print(json.dumps({"do": do, **order}), file=self.process.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        """Wait for the answer to the last order; raises as `ask` does."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(f"{self.framework}: {self.errors.read()[-3000:]}")
        return json.loads(line)

    def call(self, function: str, **arguments: Any) -> Any:
        """The result of a function of the framework's module."""
        return self.ask(function, arguments=arguments)["result"]

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()
        self.errors.close()


class Workers(dict[str, Worker]):
    """Framework to process; ended together."""

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.values():
            worker.close()


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median, lower and upper quartile, and how many there were."""
    low, median, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {"median": median, "low": low, "high": high, "samples": len(values)}


def measured(
    title: str, part: str, workers: Workers, rounds: int, arguments: dict[str, Any]
) -> dict[str, list[float]]:
    """Seconds of each contestant of a part, one a round."""
    order = [
        (worker, name)
        for worker in workers.values()
        for name in worker.ask("prepare", part=part, arguments=arguments)["cases"]
    ]
    seconds: dict[str, list[float]] = {name: [] for _, name in order}
    with Progress(transient=True) as progress:
        for k in progress.track(range(rounds), description=title):
            start = k % len(order)  # nobody always follows the same one
            for worker, name in order[start:] + order[:start]:
                seconds[name].append(worker.ask("time", case=name)["seconds"])
    return seconds


def ratios(
    part: str, which: str, seconds: dict[str, list[float]], pairs: Sequence[tuple[str, str]]
) -> list[Row]:
    """A row for each pair (contestant, base): the ratio, taken round by round."""
    rows = []
    for name, base in pairs:
        both = zip(seconds[name], seconds[base], strict=True)
        rows.append(row(part, which, name, base, "ratio", quartiles([a / b for a, b in both])))
    return rows


def row(part: str, which: str, name: str, base: str, unit: str, figures: dict) -> Row:
    return {
        "part": part,
        "set": which,
        "contestant": name,
        "against": base,
        "unit": unit,
        **figures,
    }


def of_sets(
    part: str,
    workers: Workers,
    options: argparse.Namespace,
    base_of: Callable[[str], str],
    more: Sequence[tuple[str, str]],
) -> list[Row]:
    """A part on each set of shapes: every contestant against its base, and `more` pairs."""
    rows = []
    for which in options.sets:
        shapes = workers["tensorflow"].call("shapes", which=which)
        arguments = {"which": which, "shapes": shapes}
        seconds = measured(f"{part}, {which}", part, workers, options.rounds, arguments)
        pairs = [(name, base_of(name)) for name in seconds if name != base_of(name)]
        rows += ratios(part, which, seconds, [*pairs, *more])
    return rows


def clip(workers: Workers, options: argparse.Namespace) -> list[Row]:
    """The clip alone, against a copy of the same bytes."""

    def base_of(name: str) -> str:
        if name.startswith("copy on"):
            return "copy"
        if " on JAX" in name or name.startswith("optax"):
            return "copy on JAX"
        return "copy on PyTorch" if name.startswith(("torch", "timm")) else "copy"

    return of_sets("clip", workers, options, base_of, [("ExponentialClip", "AbsoluteClip")])


def update(workers: Workers, options: argparse.Namespace) -> list[Row]:
    """Clip and update of SGD with momentum, against Keras's."""
    bases = {"optax": "no clip, optax", "torch": "no clip, torch", "timm": "no clip, torch"}
    more = [
        ("AbsoluteClip", "Keras clipvalue"),
        ("ExponentialClip", "Keras clipvalue"),
        ("NormClip variable", "Keras clipnorm"),
        ("NormClip layer", "Keras clipnorm"),
        ("NormClip global", "Keras global_clipnorm"),
    ]
    return of_sets("update", workers, options, lambda n: bases.get(n.split()[0], "no clip"), more)


def compiled(workers: Workers, options: argparse.Namespace) -> list[Row]:
    """Clip and update of each common optimizer, against Keras's update without any clip."""
    only = Workers(tensorflow=workers["tensorflow"])
    arguments = {"which": options.network, "shapes": None}
    seconds = measured("compiled updates", "compiled", only, options.rounds, arguments)
    pairs = [(name, name.partition(",")[0]) for name in seconds if "," in name]
    for inner in (name for name in seconds if "," not in name):
        pairs += [(f"{inner}, AbsoluteClip", f"{inner}, clipvalue")]
        pairs += [(f"{inner}, ExponentialClip", f"{inner}, AbsoluteClip")]
    return ratios("compiled", options.network, seconds, pairs)


def step(workers: Workers, options: argparse.Namespace) -> list[Row]:
    """Whole train steps, eight in a row."""
    only, rows = Workers(tensorflow=workers["tensorflow"]), []
    for chosen in options.step_sets:
        inner, batch = chosen.split("/")
        which = f"{options.network}, {inner}, batch {batch}"
        arguments = {"which": options.network, "shapes": None, "steps": 8}
        arguments |= {"inner": inner, "batch": int(batch), "only": options.contestants}
        seconds = measured(which, "step", only, options.step_rounds, arguments)
        pairs = [(name, "no clip") for name in seconds if name != "no clip"]
        rows += ratios("step", which, seconds, pairs)
    return rows


def memory(workers: Workers, options: argparse.Namespace) -> list[Row]:
    """The most memory that a process has held, each contestant in one of its own."""
    del workers
    peak = {}
    for name in ("no clip", "AbsoluteClip", "NormClip layer"):
        with Workers(tensorflow=Worker("tensorflow")) as fresh:
            peak[name] = fresh["tensorflow"].call("peak_memory", which=options.network, name=name)
    return [
        row("memory", options.network, name, "no clip", "ratio",
            quartiles([peak[name] / peak["no clip"]]))
        for name in peak if name != "no clip"
    ]  # fmt: skip


def monitor(workers: Workers, options: argparse.Namespace) -> list[Row]:
    """Whole train steps with ClipMonitor, as many in a row as its default period."""
    only = Workers(tensorflow=workers["tensorflow"])
    with tempfile.TemporaryDirectory() as run_dir:
        arguments = {"which": options.network, "shapes": None, "steps": 50, "run_dir": run_dir}
        rounds = max(2, options.step_rounds // 3)
        seconds = measured("train steps, monitor", "monitor", only, rounds, arguments)
        on, off = "NormClip layer, ClipMonitor", "NormClip layer"
        pairs = [(off, "no clip"), (on, "no clip"), (on, off)]
        return ratios("monitor", options.network, seconds, pairs)


def first_step(workers: Workers, options: argparse.Namespace) -> list[Row]:
    """The first train step of a new model: trace, graph optimisation, compilation, one step."""
    names = workers["tensorflow"].call("first_step_names", only=options.contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with Progress(transient=True) as progress:
        for _ in progress.track(range(options.first_steps), description="first train step"):
            for name in names:  # each in a process of its own: compiled programs are kept
                with Workers(tensorflow=Worker("tensorflow")) as fresh:
                    seconds[name].append(
                        fresh["tensorflow"].call("first_step", which=options.network, name=name)
                    )
    pairs = [(name, "no clip") for name in names if name != "no clip"]
    pairs += [
        ("AbsoluteClip", "Keras clipvalue"),
        ("NormClip layer", "Keras clipnorm"),
        ("NormClip global", "Keras global_clipnorm"),
    ]
    pairs = [(name, base) for name, base in pairs if {name, base} <= set(names)]
    return ratios("first-step", options.network, seconds, pairs)


def operations(workers: Workers, options: argparse.Namespace) -> list[Row]:
    """Graph operations a tensor; reads, constants and identities are not counted."""
    rows = []
    for which in options.sets:
        counts = workers["tensorflow"].call("graph_operations", which=which)
        for name, by_part in counts.items():
            for part, count in by_part.items():
                figures = quartiles([count])
                rows.append(
                    row(f"operations: {part}", which, name, "a tensor", "operations", figures)
                )
    return rows


def growth(workers: Workers, options: argparse.Namespace) -> list[Row]:
    """How trace and run time grow with the number of variables: the exponent, 1 is linear."""
    import numpy as np

    worker, rows = workers["tensorflow"], []
    with Progress(transient=True) as progress:
        for name in progress.track(worker.call("growth_names"), description="growth"):
            times = [worker.call("growth", count=n, name=name) for n in options.growth]
            for kind in ("trace", "run"):
                per_variable = [t[kind] / n for t, n in zip(times, options.growth, strict=True)]
                for n, each in zip(options.growth, per_variable, strict=True):
                    relative = quartiles([each / per_variable[0]])
                    rows.append(
                        row(f"growth: {kind}", f"{n} variables", name,
                            f"{options.growth[0]} variables", "time a variable, ratio", relative)
                    )  # fmt: skip
                # The upper end: below a hundred variables the fixed cost of a call shows.
                upper = [i for i, n in enumerate(options.growth) if n >= 100] or [0, 1]
                slope = np.polyfit(
                    np.log([options.growth[i] for i in upper]),
                    np.log([times[i][kind] for i in upper]),
                    1,
                )[0]
                rows.append(
                    row(f"growth: {kind}", "exponent", name, "variables", "exponent",
                        quartiles([float(slope)]))
                )  # fmt: skip
    return rows


def reductions(workers: Workers, options: argparse.Namespace) -> list[Row]:
    """All-reduces an update, and the bytes in them over the bytes of the parameters."""
    del workers
    rows = []
    for replicas in (2, 4):
        for accumulate in (1, 4):
            with Workers(tensorflow=Worker("tensorflow")) as fresh:  # it makes its own devices
                counted = fresh["tensorflow"].call(
                    "reductions", which=options.network, replicas=replicas, accumulate=accumulate
                )
            for name, found in counted.items():
                which = f"{replicas} replicas"
                share = found["bytes"] / found["parameter_bytes"]
                rows.append(
                    row("reductions", which, name, "an update", "all-reduces",
                        quartiles([found["all_reduces"]]))
                )  # fmt: skip
                rows.append(
                    row("reductions: bytes", which, name, "the parameters' bytes", "ratio",
                        quartiles([share]))
                )  # fmt: skip
    return rows


def devices(workers: Workers, options: argparse.Namespace) -> list[Row]:
    """Processor time of an update on each of 1 to 8 logical devices."""
    del workers
    of_each = {}
    for replicas in options.replicas:
        with Workers(tensorflow=Worker("tensorflow")) as fresh:  # it makes its own devices
            of_each[replicas] = fresh["tensorflow"].call(
                "on_devices", which=options.network, replicas=replicas, rounds=options.rounds
            )
    return _scaling("devices", of_each)


def processes(workers: Workers, options: argparse.Namespace) -> list[Row]:
    """Processor time of an update in each of 1 to 3 processes over the loopback interface."""
    del workers
    of_each = {}
    for number in options.processes:
        with contextlib.ExitStack() as ports:  # each is free until all are chosen
            probes = [ports.enter_context(socket.socket()) for _ in range(number)]
            for probe in probes:
                probe.bind(("127.0.0.1", 0))
            addresses = [f"127.0.0.1:{probe.getsockname()[1]}" for probe in probes]
        configs = [
            {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": k}}
            for k in range(number)
        ]
        group = [Worker("tensorflow", TF_CONFIG=json.dumps(config)) for config in configs]
        with Workers({str(k): worker for k, worker in enumerate(group)}):
            arguments = {"which": options.network, "rounds": options.rounds}
            for worker in group:  # all before the first answer: they wait for one another
                worker.send("as_worker", arguments=arguments)
            answers = [worker.answer()["result"] for worker in group]
        of_each[number] = {
            name: [statistics.fmean(each) for each in zip(*(a[name] for a in answers), strict=True)]
            for name in answers[0]
        }
    return _scaling("processes", of_each)


def _scaling(part: str, of_each: dict[int, dict[str, list[float]]]) -> list[Row]:
    """Ratios to the update without a clip for each number, and the growth with the number."""
    import numpy as np

    rows = []
    for number, seconds in of_each.items():
        pairs = [
            (name, name.partition(",")[0] if "," in name else "no clip")
            for name in seconds
            if name not in ("no clip", "RMSprop")
        ]
        rows += ratios(part, f"{number} {part}", seconds, pairs)
    for name in next(iter(of_each.values())):
        medians = [statistics.median(seconds[name]) for seconds in of_each.values()]
        slope = np.polyfit(np.log(list(of_each)), np.log(medians), 1)[0]
        rows.append(row(part, "exponent", name, "number", "exponent", quartiles([float(slope)])))
    return rows


def table(rows: Sequence[Row], title: str) -> Table:
    """The rows of one part; how each size grew is in the CSV alone."""
    result = Table(title=title, title_justify="left")
    for column in ("what", "set", "contestant", "against", "median", "quartiles", "target"):
        right = column in ("median", "quartiles")
        result.add_column(column, justify="right" if right else "left", no_wrap=True)
    for r in rows:
        if r["part"].startswith("growth") and r["set"] != "exponent":
            continue
        goal = target(r)
        mark = ""
        if goal is not None:
            mark = f"≤ {goal:g} " + ("reached" if r["median"] <= goal else "missed")
        spread = f"{r['low']:.3f} to {r['high']:.3f}" if r["samples"] > 1 else ""
        what = r["unit"] if r["part"] == title else r["part"]
        result.add_row(
            what, r["set"], r["contestant"], r["against"], f"{r['median']:.3f}", spread, mark
        )
    return result


def target(r: Row) -> float | None:
    """What the row's median should be at most."""
    for part, which, name, base, goal in TARGETS:
        if (part, which, name, base) == (r["part"], r["set"], r["contestant"], r["against"]):
            return goal
    return None


def picture(rows: Sequence[Row], path: Path) -> None:
    """Bars: the clip alone over a copy, and clip and update over the update without a clip."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = [
        ("clip", "over a copy of the same bytes"),
        ("update", "over the update without a clip"),
    ]
    drawn = [
        (part, label, [r for r in rows if r["part"] == part and r["set"] == rows[0]["set"]
                       and r["against"].startswith(("copy", "no clip"))])
        for part, label in parts
    ]  # fmt: skip
    drawn = [d for d in drawn if d[2]]
    if not drawn:
        return
    height = 1.2 + 0.27 * max(len(d[2]) for d in drawn)
    figure, axes = plt.subplots(1, len(drawn), figsize=(6.5 * len(drawn), height), squeeze=False)
    for axis, (part, label, of_part) in zip(axes[0], drawn, strict=True):
        of_part = sorted(of_part, key=lambda r: r["median"])
        names = [f"{r['contestant']}" for r in of_part]
        middle = [r["median"] for r in of_part]
        spread = [
            [m - r["low"] for m, r in zip(middle, of_part, strict=True)],
            [r["high"] - m for m, r in zip(middle, of_part, strict=True)],
        ]
        colors = [
            "#8a8a8a" if n.startswith(("Keras", "optax", "torch", "timm", "copy", "add", "no "))
            else "#2b6cb0" for n in names
        ]  # fmt: skip
        axis.barh(names, middle, xerr=spread, color=colors, error_kw={"elinewidth": 0.8})
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_title(f"{part}, {of_part[0]['set']}: {label}", fontsize=10)
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write the CSV and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help=f"the parts to measure: {', '.join(PARTS)}")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=40, help="of clips and updates")
    parser.add_argument("--step-rounds", type=int, default=12, help="of eight train steps")
    parser.add_argument("--step-sets", nargs="+", choices=STEP_SETS, default=list(STEP_SETS),
                        metavar="INNER/BATCH", help=f"of {', '.join(STEP_SETS)}")  # fmt: skip
    parser.add_argument("--contestants", nargs="+", metavar="NAME",
                        help="of the train steps, beside 'no clip' (default: all)")  # fmt: skip
    parser.add_argument("--first-steps", type=int, default=3, help="new models of each kind")
    parser.add_argument("--frameworks", nargs="+", choices=list(PYTHONS), default=list(PYTHONS))
    parser.add_argument("--tiny", action="store_true", help="tiny networks: does it run at all?")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/bench")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.step_rounds, options.first_steps) < 1:
        parser.error("--rounds, --step-rounds and --first-steps must be at least 1")
    options.sets = ["tiny"] if options.tiny else ["resnet50", "thousand"]
    options.network = "tiny" if options.tiny else "resnet50"
    options.replicas = [1, 2] if options.tiny else [1, 2, 4, 8]
    options.processes = [1, 2] if options.tiny else [1, 2, 3]
    options.growth = [10, 20] if options.tiny else [10, 30, 100, 300, 1000, 3000]

    console = Console(width=None if sys.stdout.isatty() else 130)
    workers = Workers()
    with workers:
        for framework in dict.fromkeys(["tensorflow", *options.frameworks]):
            if not Path(PYTHONS[framework]).exists():
                console.print(f"{framework}: no environment; run make venv-{framework}")
                continue
            workers[framework] = Worker(framework)
        versions = [w.call("versions") for w in workers.values()]
        versions.append(f"Python {platform.python_version()}, {os.cpu_count()} cores")
        console.print("; ".join(versions))
        rows: list[Row] = []
        options.out.mkdir(parents=True, exist_ok=True)
        for part in options.only:
            found = globals()[part.replace("-", "_")](workers, options)
            rows += found
            console.print(table(found, part))
            write(rows, versions, options.out / "bench.csv")  # an interrupted run keeps its parts
    picture(rows, options.out / "bench.png")
    console.print(f"written: {options.out / 'bench.csv'}")
    return 0


def write(rows: Sequence[Row], versions: Sequence[str], path: Path) -> None:
    """One line a row; the versions in a comment at the top."""
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(f"# {'; '.join(versions)}\n")
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for r in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()})


if __name__ == "__main__":
    sys.exit(main())
