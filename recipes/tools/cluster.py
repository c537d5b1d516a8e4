"""Runs a recipe as several workers on this machine, to try out `--strategy multiworker`.

    python recipes/tools/cluster.py --workers 2 recipes/resnet50.py --epochs 1
    python recipes/tools/cluster.py --workers 2 recipes/resnet50.py --resume

Everything after the recipe goes to each worker, and `--strategy multiworker` with it. Their lines
come out behind `[worker 1]`. When one fails, the others get a few seconds to say what they know of
it and are ended; the exit status is that of the first to fail. On several machines, start the
recipe itself on each: see docs/cluster.md.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

if not __package__:  # run as a script: the folder above recipes/ holds its packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import recipes  # noqa: F401  (changes to the environment that has what follows)

from recipes.command_line import Parser, exit_status
from recipes.errors import RecipeError

# From the loss of a worker until its heartbeat is missed, and a margin.
GRACE = 30.0
_POLL = 0.1


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def configs(count: int) -> list[str]:
    """TF_CONFIG for each of `count` workers on this machine."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(count)]
    return [
        json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": i}})
        for i in range(count)
    ]


def launch(
    command: Sequence[str],
    count: int,
    *,
    environment: Mapping[str, str] | None = None,
    gpus: int = 0,
    grace: float = GRACE,
    timeout: float | None = None,
) -> int:
    """Runs `command` as `count` workers and waits for them.

    Args:
        command: program and arguments, the same for each.
        count: int, workers.
        environment: None for that of this process; TF_CONFIG and CUDA_VISIBLE_DEVICES are added.
        gpus: int, GPUs of each worker; 0: all compute on the CPU.
        grace: seconds that the others get to end by themselves when one has failed.
        timeout: None, or seconds after which all are ended.

    Returns:
        0, or the exit status of the first worker that failed (128 + n if killed by signal n), or
        124 after `timeout`.
    """
    base = {**(os.environ if environment is None else environment), "PYTHONUNBUFFERED": "1"}
    processes: list[subprocess.Popen] = []
    readers = []
    started = time.monotonic()
    try:
        for i, config in enumerate(configs(count)):
            mine = ",".join(str(n) for n in range(i * gpus, (i + 1) * gpus))
            processes.append(
                subprocess.Popen(
                    list(command),
                    env={**base, "TF_CONFIG": config, "CUDA_VISIBLE_DEVICES": mine},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # so that what it starts ends with it
                )
            )
            reader = threading.Thread(target=_forward, args=(i, processes[-1].stdout), daemon=True)
            reader.start()
            readers.append(reader)
        return _watch(processes, grace, None if timeout is None else started + timeout)
    finally:
        _end(processes)
        for reader in readers:
            reader.join(timeout=5)


def _forward(number: int, lines: IO[bytes]) -> None:
    prefix = f"[worker {number}] ".encode()
    for line in lines:
        sys.stdout.buffer.write(prefix + line.rstrip(b"\n") + b"\n")
        sys.stdout.buffer.flush()


def _watch(processes: list[subprocess.Popen], grace: float, deadline: float | None) -> int:
    status, last_call = 0, None
    reported: set[int] = set()
    while True:
        for i, process in enumerate(processes):
            code = process.poll()
            if code is None or i in reported:
                continue
            reported.add(i)
            if code:
                _tell(f"worker {i} {_ended(code)}")
                status = status or (128 - code if code < 0 else code)
                last_call = last_call or time.monotonic() + grace
        if len(reported) == len(processes):
            return status
        now = time.monotonic()
        if last_call is not None and now > last_call:
            left = [str(i) for i in range(len(processes)) if i not in reported]
            _tell(f"worker {', '.join(left)} did not end by itself and is ended")
            return status
        if deadline is not None and now > deadline:
            _tell("the time is up: all workers are ended")
            return 124
        time.sleep(_POLL)


def _ended(code: int) -> str:
    if code > 0:
        return f"ended with status {code}"
    return f"was killed by signal {-code} ({signal.Signals(-code).name})"


def _end(processes: list[subprocess.Popen]) -> None:
    """Ends what still runs, whole process groups, first politely."""
    for polite in (True, False):
        running = [p for p in processes if p.poll() is None]
        for process in running:
            try:
                os.killpg(process.pid, signal.SIGTERM if polite else signal.SIGKILL)
            except ProcessLookupError:
                continue
        for process in running:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                continue


def _tell(line: str) -> None:
    sys.stdout.flush()
    print(f"[cluster] {line}", file=sys.stderr, flush=True)


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: of the first worker that failed, 0, 2 for a mistake, 130 after Ctrl-C."""
    parser = Parser(
        prog="cluster.py",
        description=__doc__,
        usage="cluster.py [--workers N] [--gpus N] RECIPE.py [OPTIONS OF THE RECIPE]",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of each (default: 0, the CPU)")
    parser.add_argument("recipe", help="file of the recipe")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options of the recipe")

    def work() -> int:
        args = parser.parse_args(argv)
        if args.workers < 1:
            raise RecipeError(f"--workers {args.workers}: must be 1 or more")
        if args.gpus < 0:
            raise RecipeError(f"--gpus {args.gpus}: must be 0 or more")
        if "\0" in args.recipe or not Path(args.recipe).is_file():
            raise RecipeError(f"{args.recipe} is not a file")
        command = [sys.executable, args.recipe, *args.options]
        if not any(o == "--strategy" or o.startswith("--strategy=") for o in args.options):
            command += ["--strategy", "multiworker"]
        if args.gpus and "--devices" not in args.options:
            command += ["--devices", str(args.gpus)]
        signal.signal(signal.SIGTERM, _stop)
        return launch(command, args.workers, gpus=args.gpus)

    return exit_status(
        work, interrupted=": all workers are ended; go on with the same command and --resume"
    )


if __name__ == "__main__":
    sys.exit(main())
