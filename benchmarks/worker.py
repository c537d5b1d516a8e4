"""One framework's half of the benchmark: a process that runs what it is told, one call at a time.

    python benchmarks/worker.py tensorflow

The parent (`bench.py`) writes one JSON object a line: `{"do": name, ...}`; the answer is one JSON
object a line, on a copy of standard output that nothing else writes to. So the processes of all
frameworks can be measured in turn, A B A B, under the same load.
"""

import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # `references` is among the tests

#: Name of a contestant to a function that does the work once and waits until it is done.
Cases = dict[str, Callable[[], object]]


def main(framework: str) -> None:
    """Answer the parent until it closes the pipe."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    module = importlib.import_module(f"{framework}_cases")
    cases: Cases = {}
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict = {}
        if order["do"] == "prepare":
            cases.clear()
            gc.collect()
            cases.update(getattr(module, order["part"])(**order["arguments"]))
            for case in cases.values():
                case()
                case()
            answer["cases"] = list(cases)
        elif order["do"] == "time":
            start = time.perf_counter()
            cases[order["case"]]()
            answer["seconds"] = time.perf_counter() - start
        else:  # a function that measures by itself
            answer["result"] = getattr(module, order["do"])(**order["arguments"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
