"""What benchmark workers and their parent say to each other: JSON lines on stdin and stdout.

A worker is started with one JSON argument, loads, and writes {"ready": {...}}. Then each line in is
a request and each line out its answer, until stdin ends. Everything that a library prints goes to
stderr: the real stdout is kept aside before anything heavy is imported. This file is read by
several virtual environments and imports nothing but the standard library.

    {"op": "generate", "prompts": [[3, 14, ...], ...], "num_new": 33}
        -> {"seconds": 1.9, "first_s": 0.2, "num_tokens": 264}
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

Prompts = list[list[int]]
Operation = Callable[..., Any]
Loaded = tuple[dict[str, Any], dict[str, Operation]]  # what to tell of the engine, operations


def claim_stdout() -> Any:
    """The real stdout as a text file; file descriptor 1 becomes stderr from now on."""
    kept = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return kept


def timed(generate: Callable[[Prompts, int], int]) -> Operation:
    """The "generate" operation of an offline engine, which is silent until the whole batch is done.

    `generate(prompts, num_new)` returns the number of tokens it made. The first tokens' time is
    known only when they are all that was asked for.
    """

    def operation(prompts: Prompts, num_new: int) -> dict[str, float]:
        begin = time.perf_counter()
        num_tokens = generate(prompts, num_new)
        seconds = time.perf_counter() - begin
        answer = {"seconds": seconds, "num_tokens": num_tokens}
        return answer | ({"first_s": seconds} if num_new == 1 else {})

    return operation


def run_worker(load: Callable[[dict[str, Any]], Loaded]) -> None:
    """Loads, answers requests until stdin ends. An error is an answer, and ends the worker.

    Args:
        load: takes the JSON argument, returns `Loaded`.
    """
    out = claim_stdout()
    try:
        info, operations = load(json.loads(sys.argv[1]))
        out.write(json.dumps({"ready": info}) + "\n")
        for line in sys.stdin:
            request = json.loads(line)
            answer = operations[request.pop("op")](**request)
            out.write(json.dumps(answer) + "\n")
    except Exception as error:
        traceback.print_exc()
        out.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        raise SystemExit(1) from error
