"""What each rank holds of every architecture; re-record with `pytest --record`, review the diff.

The last of two ranks, and the last of four, where key/value heads are fewer than the ranks.
"""

import re
from pathlib import Path

import pytest
import torch
from support.checkpoints import ARCHITECTURES, tiny_config

from remora.actors import model_build, model_probe
from remora.actors.tp_plan import ModelFacts, make_plan
from remora.actors.tp_surgery import facts_of, whole_text

GOLDEN = Path(__file__).parent / "tp_plan"


def facts(architecture: str) -> ModelFacts:
    """Of a small model on the meta device."""
    model = model_build.build_meta(tiny_config(architecture), torch.float32)
    model_build.compute_buffers(model)
    watch = model_probe.watch_one_pass(model)
    attention = [watch.layers[index].attention for index in range(len(watch.layers))]
    return facts_of(model, tuple(a for a in attention if a is not None), frozenset(watch.linears))


def describe(facts: ModelFacts, rank: int, size: int) -> list[str]:
    """The plan of one rank as text; equal layers as one."""
    plan = make_plan(facts, rank, size)
    lines: dict[str, list[str]] = {}

    def note(name: str, text: str) -> None:
        layer = re.match(rf"{re.escape(facts.layers)}\.(\d+)\.", name)
        key = re.sub(r"\.\d+\.", ".*.", name, count=1)
        lines.setdefault(f"{key}: {text}", []).append(layer.group(1) if layer else "")

    for name, cut in plan.cuts.items():
        spans = " + ".join(f"{begin}:{end}" for begin, end in cut.spans)
        shape = "x".join(map(str, facts.shapes[name]))
        note(name, f"[{spans}] of dimension {cut.dim} of {shape}")
    for name in sorted(plan.zeros):
        note(name, "zeros, rank 0 adds it")
    for name in plan.sums:
        note(name, "summed over the ranks")
    for name in plan.norms:
        note(name, "sum of squares over the ranks")
    return [
        f"rank {rank} of {size}",
        *(
            f"  {line}" + (f" (layers {', '.join(layers)})" if layers != [""] else "")
            for line, layers in lines.items()
        ),
        f"  {whole_text(plan)}",
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plan(architecture: str, request: pytest.FixtureRequest) -> None:
    whole = facts(architecture)
    text = "\n".join([*describe(whole, 1, 2), *describe(whole, 3, 4)]) + "\n"
    path = GOLDEN / f"{architecture}.txt"
    if request.config.getoption("--record"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parts_make_the_whole(architecture: str) -> None:
    """Every element of a parameter that is cut is on some rank; where not replicated, on one."""
    whole = facts(architecture)
    for size in (2, 4):
        plans = [make_plan(whole, rank, size) for rank in range(size)]
        assert all(plan.cuts.keys() == plans[0].cuts.keys() for plan in plans)
        for name, cut in plans[0].cuts.items():
            count = whole.shapes[name][cut.dim]
            held = torch.zeros(count, dtype=torch.int64)
            for plan in plans:
                for begin, end in plan.cuts[name].spans:
                    held[begin:end] += 1
            copies = held.unique().tolist()
            assert len(copies) == 1 and copies[0] >= 1, f"{name}: {held}"
            assert copies == [1] or re.search(r"\.(k|v)_(proj|norm)\.", name), name
