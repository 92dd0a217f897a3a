"""The pure parts of benchmarks/: bars, limits, groups, tables and the plot."""

import argparse
import json
import struct
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.programs import BENCHMARKS, benchmarks_on_path
from support.programs import program as module


@pytest.fixture(scope="module", autouse=True)
def on_path() -> Iterator[None]:
    with benchmarks_on_path():
        yield


def samples_of(rates: dict[str, list[float]], case: str) -> Any:
    """Samples of targets in one case."""
    measure, process = module("engines_measure"), module("engines_process")
    cpu = process.CpuShares(measured=1.0, idle_engines=0.0, others=0.0)
    return {
        (case, target): [measure.Sample(tokens_per_s=r, first_ms=1.0, cpu=cpu) for r in each]
        for target, each in rates.items()
    }


@pytest.mark.parametrize(
    ("op", "target", "holds"),
    [
        (">=", 2.0, True),
        (">=", 2.1, False),
        ("<=", 2.0, True),
        ("<", 2.0, False),
        (None, None, None),
    ],
)
def test_a_bar_is_judged_by_its_median(op: str, target: float, holds: bool) -> None:
    report = module("engines_report")
    value = report.Spread.of([1.0, 2.0, 9.0])
    assert report.Bar(name="b", value=value, unit="x", op=op, target=target).holds is holds


def test_a_peer_is_the_better_of_its_ways_and_ratios_stay_within_rounds() -> None:
    report, measure = module("engines_report"), module("engines_measure")
    case = measure.decode_case(8, 33)
    rates = {"remora": [10.0, 30.0, 20.0], "vllm": [5.0, 10.0, 10.0], "vllm-tp2": [9.0, 9.0, 9.0]}
    samples = samples_of(rates, case.name)
    (bar,) = report.peer_bars("tiny", samples, [case], "vllm", ["vllm", "vllm-tp2"])
    assert bar.name == "tiny_decode_b8_vs_vllm" and bar.target == 1.0
    assert (bar.value.median, bar.value.min, bar.value.max) == (2.0, 2.0, 3.0)
    (bar,) = report.peer_bars("tiny", samples, [case], "transformers", ["vllm-tp2"])
    assert bar.target == 2.0


def write_checkpoint(path: Path) -> None:
    """Two layers of two experts, dense weights and a table, without data."""
    shapes = {"model.embed_tokens.weight": [100, 8], "lm_head.weight": [100, 8]}
    for layer in range(2):
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = [8, 8]
        for expert in range(2):
            for name in ("gate_proj", "up_proj", "down_proj"):
                shapes[f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"] = [4, 8]
    header = json.dumps({name: {"shape": s, "dtype": "BF16"} for name, s in shapes.items()})
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode())


def test_weights_that_a_step_touches(tmp_path: Path) -> None:
    limit = module("engines_limit")
    write_checkpoint(tmp_path)
    weights = limit.weights_of(tmp_path)
    assert weights.expert_bytes == 3 * 4 * 8 * 2
    assert weights.dense_bytes == (100 * 8 + 2 * 8 * 8) * 2  # without the embedding table
    assert weights.total_bytes == weights.dense_bytes + 4 * weights.expert_bytes + 100 * 8 * 2
    assert weights.touched(3.5) == weights.dense_bytes + 3.5 * weights.expert_bytes


def test_the_share_of_the_limit() -> None:
    bar = module("engines_limit").limit_bar("small", 8, [80.0, 60.0], [1e9, 2e9], 5e7)
    # the limit is 8 x 1e9 / 5e7 = 160 tokens/s in the first round and 320 in the second
    assert (bar.value.max, bar.value.min) == (0.5, 0.1875)
    assert bar.name == "small_decode_b8_of_limit" and bar.target == 0.70


def test_engines_that_are_resident_together() -> None:
    groups_of = module("serve").groups_of
    assert groups_of(["remora", "vllm", "transformers"]) == [
        ["remora", "vllm"],
        ["remora", "transformers"],
    ]
    assert groups_of(["remora", "transformers"]) == [["remora", "transformers"]]
    assert groups_of(["remora"]) == [["remora"]]


def test_a_variant_is_a_name_keys_and_pins() -> None:
    variants = module("variants")
    variant = variants.parse_variant("two experts.threads=2 pin.shard-0=0 pin.dense-0=0,1")
    assert variant.name == "two" and variant.overrides == {"experts.threads": 2}
    assert variant.pinned == {"shard-0": [0], "dense-0": [0, 1]}
    with pytest.raises(argparse.ArgumentTypeError, match="name"):
        variants.parse_variant("experts.threads=2")


def test_the_table_of_scaling() -> None:
    own = module("engines_own")
    table = own.scaling_table({"1 shard": {1: 10.0, 64: 640.0}, "2 shards": {1: 9.5, 64: 1200.0}})
    assert table.splitlines()[0] == "| tokens/s at streams | 1 | 64 |"
    assert table.splitlines()[-1] == "| 2 shards | 9.5 | 1200 |"


def test_the_plot_is_svg_with_a_line_for_each_series() -> None:
    plot = module("engines_plot")
    series = {"1 shard": {1: 10.0, 8: 50.0}, "2 shards": {1: 12.0, 8: 90.0}}
    tree = ET.fromstring(plot.line_plot("t", "streams", series))
    lines = [e for e in tree if e.tag.endswith("polyline")]
    assert len(lines) == 2
    first = [tuple(map(float, p.split(","))) for p in lines[0].attrib["points"].split()]
    assert first[0][0] < first[1][0] and first[0][1] > first[1][1]  # right, and up
    assert all(0 <= x <= plot.WIDTH and 0 <= y <= plot.HEIGHT for x, y in first)


def test_the_page_says_what_every_program_needs() -> None:
    """docs/benchmarks.md, What a benchmark needs."""
    page = (BENCHMARKS.parent / "docs" / "benchmarks.md").read_text()
    table = page.partition("## What a benchmark needs")[2].partition("\n## ")[0]
    for path in BENCHMARKS.glob("*.py"):
        if '__name__ == "__main__"' in path.read_text():
            assert f"| `{path.stem}` |" in table or f"benchmarks/{path.name}" in table, path.name
