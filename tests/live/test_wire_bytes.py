"""Bytes on real links: what the transports count, what the model says, what the kernel saw."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.programs import benchmarks_on_path, program

pytestmark = pytest.mark.live

WIRE_HOST = str(Path(__file__).resolve().parents[1] / "support" / "wire_host.py")
FRAME_BYTES = 14 + 20 + 32  # Ethernet, IP, TCP with timestamps: every packet of a settled stream
# Address resolution, acknowledgements with a selective part.
OVERHEAD_MAX = 0.02
SLACK_BYTES = 2048
SEGMENT_BYTES = 1448  # the most that one holds


@pytest.fixture(scope="module")
def netns() -> Iterator[Any]:
    with benchmarks_on_path():
        module = program("netns")
        reason = module.usable()
        if reason is not None:
            pytest.skip(reason)
        yield module


@pytest.fixture(scope="module")
def hosts(netns: Any) -> Iterator[Any]:
    """Two hosts with a shard each and one for the rank, over links of 1 Gbit/s."""
    with netns.Hosts(count=3, mbit=1000) as made:
        yield made


def popen(hosts: Any, host: int, *arguments: str) -> "subprocess.Popen[str]":
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process: subprocess.Popen[str] = hosts.popen(
        host, [sys.executable, "-P", WIRE_HOST, *arguments], **pipes
    )
    return process


def line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.fixture(scope="module")
def shards(hosts: Any) -> Iterator[list[dict[str, Any]]]:
    processes = [popen(hosts, host, "shard", hosts.ip(host)) for host in (1, 2)]
    yield [json.loads(line(process)) for process in processes]
    for process in processes:
        process.communicate(timeout=30)
        assert process.returncode == 0


@pytest.mark.parametrize("native", [True, False], ids=["native", "python"])
@pytest.mark.parametrize("combine", ["presummed", "ordered"])
def test_counted_bytes_are_the_models_and_the_links(
    hosts: Any, shards: list[dict[str, Any]], combine: str, native: bool
) -> None:
    task = {"shards": shards, "combine": combine, "native": native, "layers": 60}
    rank = popen(hosts, 3, "rank", json.dumps(task))
    assert rank.stdin is not None
    assert line(rank) == "connected\n"
    before = {host: hosts.counters(host) for host in (1, 2, 3)}
    again = {host: -retransmitted(hosts, host) for host in (1, 2, 3)}
    rank.stdin.write("go\n")
    rank.stdin.flush()
    report = json.loads(line(rank))
    seen = {host: hosts.counters(host).since(before[host]) for host in (1, 2, 3)}
    again = {host: number + retransmitted(hosts, host) for host, number in again.items()}
    rank.communicate(timeout=30)
    assert rank.returncode == 0

    assert report["counted"] == report["expected"]
    out = back = 0
    for host, (sent, received) in zip((1, 2), report["counted"].values(), strict=True):
        out, back = out + sent, back + received
        # A shard's link takes in what the rank sent to it, and gives out the answers.
        check(seen[host].received_bytes, seen[host].received_packets, sent, again[3])
        check(seen[host].sent_bytes, seen[host].sent_packets, received, again[host])
    check(seen[3].sent_bytes, seen[3].sent_packets, out, again[3])
    check(seen[3].received_bytes, seen[3].received_packets, back, again[1] + again[2])
    assert out > 1_000_000 and back > 1_000_000


def retransmitted(hosts: Any, host: int) -> int:
    """TCP segments that a host has sent a second time: a busy machine's links drop some."""
    command = hosts.command(host, ["cat", "/proc/net/snmp"])
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    names, values = (each.split() for each in text.splitlines() if each.startswith("Tcp:"))
    return int(values[names.index("RetransSegs")])


def check(link_bytes: int, packets: int, counted: int, segments_again: int) -> None:
    """The link carried what was counted, the headers of its packets, and next to nothing else but
    what TCP sent twice."""
    payload = link_bytes - FRAME_BYTES * packets
    more = SLACK_BYTES + segments_again * SEGMENT_BYTES
    assert counted <= payload <= counted * (1 + OVERHEAD_MAX) + more, (
        f"{link_bytes} bytes in {packets} packets: {payload} of payload, {counted} counted, "
        f"{segments_again} segments sent twice"
    )
