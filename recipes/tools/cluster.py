"""Runs a recipe as several workers on this machine, to try out `--strategy multiworker`.

    python recipes/tools/cluster.py --workers 2 recipes/resnet50.py --epochs 1
    python recipes/tools/cluster.py --workers 2 recipes/resnet50.py --resume
    python recipes/tools/cluster.py --workers 2 --gpus 1 recipes/vgg16.py --batch-size 64

Everything after the recipe goes to each worker, and `--strategy multiworker` with it. Their lines
come out behind `[worker 1]`. When one fails, the others get a few seconds to say what they know of
it and are ended; the exit status is that of the first to fail. On several machines, start the
recipe itself on each: see docs/cluster.md.
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
from types import FrameType

try:
    from recipes.command_line import Parser, exit_status
    from recipes.errors import RecipeError
except ModuleNotFoundError as error:
    sys.exit(f"error: no module {error.name}: run `make venv`, then .venv/bin/python (README.md)")

# From the loss of a worker until its heartbeat is missed, and a margin.
GRACE = 30.0


def configs(count: int) -> list[str]:
    """TF_CONFIG for each of `count` workers on this machine, at ports that nobody listens on."""
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
        count: int, workers.
        environment: of each; TF_CONFIG and CUDA_VISIBLE_DEVICES are added.
        gpus: int, GPUs of each worker; 0: all compute on the CPU.
        grace: seconds that the others get to end by themselves when one has failed.
        timeout: seconds after which all are ended.

    Returns:
        0, or the exit status of the first worker that failed (128 + n if killed by signal n), or
        124 after `timeout`.
    """
    deadline, status, running = time.monotonic() + timeout, 0, {}
    try:
        for i, config in enumerate(configs(count)):
            devices = ",".join(str(n) for n in range(i * gpus, (i + 1) * gpus))
            own = {"PYTHONUNBUFFERED": "1", "TF_CONFIG": config, "CUDA_VISIBLE_DEVICES": devices}
            running[i] = subprocess.Popen(
                list(command),
                env={**environment, **own},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that what it starts ends with it
            )
        readers = {
            i: threading.Thread(target=_forward, args=(i, process), daemon=True)
            for i, process in running.items()
        }
        for reader in readers.values():
            reader.start()
        while running and time.monotonic() < deadline:
            for i, process in list(running.items()):
                if (code := process.poll()) is None:
                    continue
                del running[i]
                readers[i].join(timeout=5)  # its last lines come before ours
                if code:
                    _say(f"worker {i} {_ended(code)}")
                    deadline = min(deadline, time.monotonic() + grace)
                    status = status or (128 - code if code < 0 else code)
            time.sleep(0.1)
        if running:
            _say(f"worker {', '.join(map(str, running))} did not end by itself and is ended")
        return status or (124 if running else 0)
    finally:
        for process in running.values():
            os.killpg(process.pid, signal.SIGKILL)  # TensorFlow ignores a polite signal
            process.wait()


def _forward(number: int, process: subprocess.Popen) -> None:
    for line in process.stdout or ():
        sys.stdout.buffer.write(f"[worker {number}] ".encode() + line.rstrip(b"\n") + b"\n")
        sys.stdout.buffer.flush()


def _ended(code: int) -> str:
    if code > 0:
        return f"ended with status {code}"
    return f"was killed by signal {-code} ({signal.Signals(-code).name})"


def _say(line: str) -> None:
    sys.stdout.flush()
    print(f"[cluster] {line}", file=sys.stderr, flush=True)


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: of the first worker that failed, 0, 2 for a mistake, 130 after Ctrl-C."""
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
