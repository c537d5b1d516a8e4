"""Runs a recipe as several workers on this machine, to try out `--strategy multiworker`.

    python recipes/tools/cluster.py --workers 2 recipes/resnet50.py --epochs 1
    python recipes/tools/cluster.py --workers 2 recipes/resnet50.py --resume
    python recipes/tools/cluster.py --workers 2 --gpus 1 recipes/vgg16.py --batch-size 64

Everything after the recipe is passed to each worker, with `--strategy multiworker`. Their output is
prefixed by `[worker 1]`. When one fails, the others get a few seconds to report and are then ended;
the exit status is that of the first failure. On several machines, start the recipe itself on each:
see docs/cluster.md.
"""

import argparse
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

try:
    from recipes import processes
    from recipes.command_line import Parser, exit_status
    from recipes.errors import RecipeError
except ModuleNotFoundError as error:
    sys.exit(f"error: no module {error.name}: run `make venv`, then .venv/bin/python (README.md)")

# Time until a missing heartbeat is detected, and a margin.
GRACE = 30.0


def configs(count: int) -> list[str]:
    """TF_CONFIG for each of `count` workers on this machine, with free ports."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = ["127.0.0.1:{1}".format(*s.getsockname()) for s in sockets]
    for s in sockets:
        s.close()
    cluster = {"worker": addresses}
    tasks = [{"type": "worker", "index": i} for i in range(count)]
    return [json.dumps({"cluster": cluster, "task": task}) for task in tasks]


def launch(
    command: Sequence[str],
    count: int,
    *,
    environment: Mapping[str, str] = os.environ,
    gpus: int = 0,
    grace: float = GRACE,
    timeout: float = math.inf,
) -> int:
    """Runs `command` as `count` workers and waits for them.

    Args:
        command: program and arguments, the same for each.
        count: the number of workers.
        environment: environment variables; TF_CONFIG and CUDA_VISIBLE_DEVICES are added.
        gpus: GPUs per worker; 0: all use the CPU.
        grace: seconds for the others to end by themselves after one has failed.
        timeout: seconds after which all are ended.

    Returns:
        0, or the exit status of the first worker that failed (128 + n if killed by signal n), or
        124 after `timeout`.
    """
    environments = {
        str(i): {
            **environment,
            "PYTHONUNBUFFERED": "1",
            "TF_CONFIG": config,
            "CUDA_VISIBLE_DEVICES": ",".join(str(i * gpus + n) for n in range(gpus)),
        }
        for i, config in enumerate(configs(count))
    }
    deadline, status, readers = time.monotonic() + timeout, 0, {}
    try:
        with processes.started(command, environments) as workers:
            for name, worker in workers.items():
                readers[name] = threading.Thread(target=_forward, args=(name, worker), daemon=True)
                readers[name].start()
            running = dict(workers)
            while running and time.monotonic() < deadline:
                time.sleep(0.1)
                for name in [name for name, worker in running.items() if worker.poll() is not None]:
                    code = running.pop(name).returncode
                    readers[name].join(timeout=5)  # print its last lines first
                    if code:
                        _say(f"worker {name} {processes.ending(code)}")
                        deadline = min(deadline, time.monotonic() + grace)
                        status = status or (128 - code if code < 0 else code)
            if running:
                _say(f"worker {', '.join(running)} did not end by itself and is ended")
        return status or (124 if running else 0)
    finally:
        for reader in readers.values():
            reader.join(timeout=5)


def _forward(name: str, worker: subprocess.Popen) -> None:
    for line in worker.stdout or ():
        sys.stdout.buffer.write(f"[worker {name}] ".encode() + line.rstrip(b"\n") + b"\n")
        sys.stdout.buffer.flush()


def _say(line: str) -> None:
    sys.stdout.flush()
    print(f"[cluster] {line}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Exit status: the first failed worker's; 0; 2 for a mistake; 130: Ctrl-C."""
    program = "python recipes/tools/cluster.py"
    usage = f"{program} [--workers N] [--gpus N] RECIPE.py [OPTIONS OF THE RECIPE]"
    parser = Parser(program, __doc__, usage=usage)
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
        given = {option.partition("=")[0] for option in args.options}
        if "--strategy" not in given:
            command += ["--strategy", "multiworker"]
        if args.gpus and "--devices" not in given:
            command += ["--devices", str(args.gpus)]
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        return launch(command, args.workers, gpus=args.gpus)

    return exit_status(
        work, interrupted=": all workers are ended; go on with the same command and --resume"
    )


if __name__ == "__main__":
    sys.exit(main())
