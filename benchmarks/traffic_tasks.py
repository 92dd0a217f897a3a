"""The parts of `traffic.py` as tasks that processes share: trace, shape, fold, what to run."""

import hashlib
import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import common
import traffic_data as data
from traffic_data import Trace
from traffic_ladder import BASELINES, REMORA, Held, Method, Result, Shape, run_fold
from traffic_record import demo, second
from traffic_shift import run_shift
from traffic_token_ids import run_token_ids

from remora.comm.topology import Topology

Kind = Literal["ladder", "token ids", "shift"]
FOLDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Runs on its own; `index` is a fold, or the domain that traffic turns to."""

    kind: Kind
    trace: str  # "v2lite", "demo", "second"
    shape: Shape
    index: int
    layers: tuple[int, ...] | None = None  # None: all
    documents: int = 48  # held-out ones of each domain of the demo model


@lru_cache(maxsize=4)
def load(trace: str, documents: int, layers: tuple[int, ...] | None) -> Trace | None:
    """A trace by name, or None where its data are not."""
    if trace == "v2lite":
        found = data.deepseek_v2_lite()
    elif trace == "demo":
        found = demo(documents)
    else:
        found = second()
    return found if found is None or layers is None else found.layers(layers)


@lru_cache(maxsize=2)
def _folds(trace: str, documents: int, layers: tuple[int, ...] | None) -> list[tuple[Trace, Trace]]:
    found = load(trace, documents, layers)
    assert found is not None, f"no data for {trace}"
    return list(data.folds(found, FOLDS))


def oracle_of(judge: Trace) -> Method:
    """Remora planned on the very tokens that it is judged on: what better prediction could give."""

    def place(_: Trace, topology: Topology) -> Held:
        return REMORA.place(judge, topology)

    return Method("B6 planned on held-out", place, REMORA.choose)


def run(task: Task) -> list[Result]:
    """All results of a task."""
    if task.kind == "shift":
        whole = load(task.trace, task.documents, task.layers)
        assert whole is not None, f"no data for {task.trace}"
        return run_shift(whole, task.index, task.shape)
    plan, judge = _folds(task.trace, task.documents, task.layers)[task.index]
    if task.kind == "token ids":
        return run_token_ids(plan, judge, task.shape, task.index)
    methods: list[Method] = [*BASELINES, REMORA]
    bar_shape = task.shape in (Shape(8, 1, 0.0), Shape(8, 1, 0.25))
    if task.trace == "v2lite" and bar_shape and task.index == 0:  # as long as two other methods
        methods.append(oracle_of(judge))
    judges = {task.trace: judge}
    if bar_shape:
        judges |= {f"{task.trace}: {name} alone": own for name, own in judge.by_domain().items()}
    return run_fold(methods, plan, judges, task.shape, task.index)


def run_all(tasks: Sequence[Task], processes: int, kept: Path | None) -> Iterator[list[Result]]:
    """Results as tasks end, in their order; those in `kept` are not run again (`_kept_as`)."""
    runs = partial(_run_once, kept=kept)
    if processes == 1:
        yield from map(runs, tasks)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(runs, tasks)


def _run_once(task: Task, kept: Path | None) -> list[Result]:
    if kept is None:
        return run(task)
    path = kept / _kept_as(task)
    if path.exists():
        found: list[Result] = pickle.loads(path.read_bytes())
        return found
    found = run(task)
    part = path.with_suffix(".part")
    part.write_bytes(pickle.dumps(found))
    part.rename(path)
    return found


@lru_cache(maxsize=1)
def _sources() -> str:
    """Of what plans and judges, as the files are now."""
    digest = hashlib.sha256()
    for folder, pattern in ((common.HERE.parent / "comm", "*.py"), (common.HERE, "traffic_*.py")):
        for path in sorted(folder.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _kept_as(task: Task) -> str:
    """A file name: results of other sources are not taken."""
    return hashlib.sha256(f"{_sources()} {task}".encode()).hexdigest()[:24] + ".pickle"
