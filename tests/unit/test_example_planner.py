"""examples/planner.py, as a reader runs it: on a made trace, down to `remora plan`."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import make_checkpoint

from remora.actors.model_spec import inspect_model
from remora.cluster.cli import main
from remora.comm.trace import TraceHeader, TraceWriter, make_trace

PROGRAM = Path(__file__).resolve().parents[2] / "examples" / "planner.py"
TOKENS, REQUEST = 1200, 40  # tokens in all, and of a request


def write_trace(path: Path, model: Path, num_requests: int = TOKENS // REQUEST) -> None:
    """Experts that are picked in fours: there is something to group."""
    spec = inspect_model(model)
    rng = np.random.default_rng(0)
    tokens = num_requests * REQUEST
    shape = (len(spec.moe_layers), tokens, spec.num_experts)
    scores = rng.gumbel(size=shape)
    scores += 4.0 * (np.arange(spec.num_experts) % 2 == rng.integers(0, 2, (tokens, 1)))
    header = TraceHeader(
        model=str(model),
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        moe_layers=spec.moe_layers,
    )
    ids_LTK = np.argsort(-scores, axis=2)[:, :, : spec.top_k].astype(np.int16)
    request_T = np.arange(tokens, dtype=np.int32) // REQUEST
    with TraceWriter(path, header) as writer:
        writer.append(make_trace(header, experts_LTK=ids_LTK, request_T=request_T))


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_planners_are_judged_and_the_placement_is_accepted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_checkpoint(tmp_path / "model", "qwen3_moe")
    trace, output = tmp_path / "t.trace", tmp_path / "mine.yaml"
    write_trace(trace, model)
    done = run(trace, "--hosts", "2", "--slots", "5", "--output", output)
    assert done.returncode == 0, done.stderr
    figures = {
        words[0]: (float(words[1]), float(words[2]))
        for words in map(str.split, done.stdout.splitlines())
        if words[0] in ("EPLB", "Remora", "mine")
    }
    assert figures["Remora"][0] < 0.8 * figures["EPLB"][0]
    assert all(load >= 1 for _, load in figures.values()) and "mine" in figures
    fits = ["--shards", "2", "--slots", "5"]
    assert main(["placement", "check", str(output), "--model", str(model), *fits]) == 0
    assert main(["plan", str(model), "--placement", str(output), *fits]) == 0
    capsys.readouterr()
    few = run(trace, "--hosts", "2", "--slots", "3")
    assert few.returncode == 1 and "--slots 3: with --hosts 2, 4 to 8 slots" in few.stderr


def test_what_is_no_trace_or_an_empty_one_is_said(tmp_path: Path) -> None:
    missing = run(tmp_path / "none.trace")
    assert missing.returncode == 1 and "none.trace" in missing.stderr
    assert "Traceback" not in missing.stderr
    header = TraceHeader(model="m", num_experts=8, top_k=2, moe_layers=(0,))
    with TraceWriter(tmp_path / "empty.trace", header):
        pass
    assert "no tokens are in the trace" in run(tmp_path / "empty.trace").stderr
