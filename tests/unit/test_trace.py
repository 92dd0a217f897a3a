"""Routing traces: what is written is read; damage is refused, or the file is read up to it.

Shape suffixes as in comm/trace.py.
"""

import errno
import os
import resource
import zlib
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from remora.comm import trace as trace_module
from remora.comm.bundles import NO_EXPERT
from remora.comm.errors import TraceError
from remora.comm.trace import (
    BLOCK_TOKENS,
    DECODE,
    MAGIC,
    PRELUDE,
    VERSION,
    Trace,
    TraceHeader,
    TraceWriter,
    join,
    make_trace,
    unfinished,
)
from remora.comm.trace_reader import TraceReader, read_trace


def header_of(num_experts: int = 40, top_k: int = 3, has_weights: bool = False) -> TraceHeader:
    return TraceHeader(
        model="m",
        num_experts=num_experts,
        top_k=top_k,
        moe_layers=(1, 3),
        vocab_size=1000,
        has_weights=has_weights,
    )


def rows_of(header: TraceHeader, num_tokens: int, seed: int, domain: str | None = "a") -> Trace:
    """Tokens whose every column is a function of the row and the seed."""
    rng = np.random.default_rng(seed)
    shape = (len(header.moe_layers), num_tokens, header.top_k)
    return make_trace(
        header,
        experts_LTK=rng.integers(NO_EXPERT, header.num_experts, shape),
        request_T=np.sort(rng.integers(0, 5, num_tokens)),
        token_T=rng.integers(0, 1000, num_tokens),
        domain=domain,
        source=f"dense-{seed % 2}",
        phase_T=rng.integers(0, 2, num_tokens),
        weights_LTK=rng.random(shape) if header.has_weights else None,
    )


def write(path: Path, header: TraceHeader, parts: list[Trace]) -> None:
    with TraceWriter(path, header) as writer:
        for part in parts:
            writer.append(part)


def assert_same(found: Trace, wanted: Trace) -> None:
    for name in ("token_T", "position_T", "request_T", "phase_T", "experts_LTK"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), err_msg=name)
    for label, names in (("domain_T", "domains"), ("source_T", "sources")):

        def named(trace: Trace, label: str = label, names: str = names) -> NDArray[np.str_]:
            return np.array([*getattr(trace, names), "none"])[getattr(trace, label)]

        np.testing.assert_array_equal(named(found), named(wanted))
    if wanted.weights_LTK is None:
        assert found.weights_LTK is None
    else:
        np.testing.assert_array_equal(found.weights_LTK, wanted.weights_LTK)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 3000), st.sampled_from(["a", "b", None])), max_size=5),
    st.sampled_from([3, 255, 256, 5000]),
    st.booleans(),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[tuple[int, str | None]],
    num_experts: int,
    has_weights: bool,
) -> None:
    header = header_of(num_experts, has_weights=has_weights)
    path = tmp_path_factory.mktemp("trace") / "t.trace"
    parts = [rows_of(header, size, seed, name) for seed, (size, name) in enumerate(sizes)]
    write(path, header, parts)
    found = read_trace(path)
    assert found.is_whole
    assert found.header == header
    assert_same(found, join(parts) if parts else rows_of(header, 0, 0))


def test_memory_is_bounded_by_blocks(tmp_path: Path) -> None:
    header = header_of()
    rows = rows_of(header, 3 * BLOCK_TOKENS + 5, 1)
    write(tmp_path / "t", header, [rows])
    sizes = [block.num_tokens for block in TraceReader(tmp_path / "t").blocks()]
    assert sum(sizes) == rows.num_tokens
    assert max(sizes) <= BLOCK_TOKENS
    assert read_trace(tmp_path / "t", tokens_max=BLOCK_TOKENS + 1).num_tokens == BLOCK_TOKENS + 1


def test_positions_count_from_the_start_of_each_request() -> None:
    header = header_of(top_k=1)
    rows = make_trace(
        header,
        experts_LTK=np.zeros((2, 5, 1), np.int16),
        request_T=np.array([7, 7, 2, 7, 2]),
        phase_T=DECODE,
    )
    assert rows.position_T.tolist() == [0, 1, 0, 2, 1]
    assert rows.phase_T.tolist() == [DECODE] * 5


@settings(max_examples=60)
@given(st.data())
def test_a_truncated_file_is_read_up_to_its_last_whole_block(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    header = header_of()
    path = tmp_path_factory.mktemp("trace") / "t"
    rows = rows_of(header, 2 * BLOCK_TOKENS, 3)
    write(path, header, [rows])
    whole = path.read_bytes()
    first = PRELUDE.size + len(msgspec.msgpack.encode(header))
    path.write_bytes(whole[: data.draw(st.integers(first, len(whole) - 1))])
    found = read_trace(path)
    assert not found.is_whole
    assert found.num_tokens % BLOCK_TOKENS == 0
    assert_same(found, rows.select(slice(0, found.num_tokens)))


@settings(max_examples=200)
@given(st.data())
def test_damage_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever byte changes, tokens come back as written or not at all."""
    header = header_of()
    path = tmp_path_factory.mktemp("trace") / "t"
    rows = rows_of(header, 50, 4)
    write(path, header, [rows])
    whole = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    try:
        found = read_trace(path)
    except TraceError as error:
        assert str(path) in str(error)
        return
    assert_same(found, rows.select(slice(0, found.num_tokens)))


def test_files_that_are_no_trace(tmp_path: Path) -> None:
    for content, text in ((b"", "not a routing trace"), (b"x" * 100, "not a routing trace")):
        (tmp_path / "t").write_bytes(content)
        with pytest.raises(TraceError, match=text):
            read_trace(tmp_path / "t")
    write_over = tmp_path / "v"
    write(write_over, header_of(), [])
    data = bytearray(write_over.read_bytes())
    data[8] = 9
    write_over.write_bytes(data)
    with pytest.raises(TraceError, match="version 9"):
        read_trace(write_over)
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path / "absent")


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "t", header_of(), [])
    with pytest.raises(TraceError, match="exists already"):
        TraceWriter(tmp_path / "t", header_of())
    TraceWriter(tmp_path / "t", header_of(), overwrite=True).close()


def test_one_that_is_to_be_replaced_is_kept_until_the_new_one_is_whole(tmp_path: Path) -> None:
    """It was gone as soon as the new recording began, whatever became of that."""
    path, header = tmp_path / "t", header_of()
    old, new = rows_of(header, 7, 1), rows_of(header, BLOCK_TOKENS + 5, 2)
    write(path, header, [old])
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(RuntimeError, match="the model"), TraceWriter(path, header, overwrite=True):
        raise RuntimeError("the model cannot be loaded")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "link", path], "nothing is in the new one"
    with pytest.raises(KeyboardInterrupt), TraceWriter(path, header, overwrite=True) as writer:
        writer.append(new)
        raise KeyboardInterrupt
    assert_same(read_trace(path), old)
    half = read_trace(unfinished(path))
    assert half.num_tokens == BLOCK_TOKENS and not half.is_whole
    with TraceWriter(tmp_path / "link", header, overwrite=True) as writer:
        writer.append(new)
        assert_same(read_trace(path), old)
    assert_same(read_trace(path), new)
    assert not unfinished(path).exists() and (tmp_path / "link").is_symlink()


def test_a_recording_that_comes_to_nothing_is_not_in_the_way_of_the_next(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), TraceWriter(tmp_path / "t", header_of()):
        raise RuntimeError("the model cannot be loaded")
    write(tmp_path / "t", header_of(), [])


def test_a_full_disk_says_so() -> None:
    """/dev/full is the kernel's own full disk."""
    with pytest.raises(TraceError, match=os.strerror(errno.ENOSPC)):
        TraceWriter(Path("/dev/full"), header_of(), overwrite=True)


def test_what_was_written_before_the_disk_was_full_is_kept(tmp_path: Path) -> None:
    rows = rows_of(header_of(), BLOCK_TOKENS, 5)
    write(tmp_path / "one", header_of(), [rows])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = (tmp_path / "one").stat().st_size + 100
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(TraceError, match=os.strerror(errno.EFBIG)):
            write(tmp_path / "t", header_of(), [rows, rows])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    found = read_trace(tmp_path / "t")
    assert not found.is_whole
    assert_same(found, rows)


@pytest.mark.parametrize("room", [10, 400])
def test_a_disk_that_is_full_before_the_first_token_keeps_no_file(
    tmp_path: Path, room: int
) -> None:
    """Neither without room for what a trace begins with, nor without any for its first block."""
    rows = rows_of(header_of(), BLOCK_TOKENS, 5)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(TraceError, match=os.strerror(errno.EFBIG)):
            write(tmp_path / "t", header_of(), [rows])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_ids_out_of_range_are_refused() -> None:
    header = header_of(num_experts=4, top_k=2)
    with pytest.raises(TraceError, match="expert ids"):
        make_trace(header, experts_LTK=np.full((2, 1, 2), 4), request_T=np.zeros(1, int))
    with pytest.raises(TraceError, match="the header says"):
        make_trace(header, experts_LTK=np.zeros((2, 1, 3), int), request_T=np.zeros(1, int))
    with pytest.raises(TraceError, match="top 5 of 4"):
        TraceHeader(model="", num_experts=4, top_k=5, moe_layers=(0,)).check()
    with pytest.raises(TraceError, match="no domain 'z'"):
        rows_of(header, 3, 0).domain_mask("z")


def test_a_file_of_ids_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    """As of a program that counts experts from 1: they are not taken for none."""
    wrote, named = (msgspec.msgpack.encode(header_of(num_experts=n)) for n in (41, 40))
    rows = rows_of(header_of(num_experts=41), 500, 0)
    assert rows.experts_LTK.max() == 40
    write(tmp_path / "t", rows.header, [rows])
    records = (tmp_path / "t").read_bytes()[PRELUDE.size + len(wrote) :]
    prelude = PRELUDE.pack(MAGIC, VERSION, 0, len(named), zlib.crc32(named))
    (tmp_path / "t").write_bytes(prelude + named + records)
    with pytest.raises(TraceError, match="experts up to 40 of 40, from 0 on"):
        read_trace(tmp_path / "t")


def test_labels_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_module, "LABELS_MAX", 2)
    with TraceWriter(tmp_path / "t", header_of()) as writer:
        writer.append(rows_of(header_of(), 1, 0, "a"))
        writer.append(rows_of(header_of(), 1, 0, "b"))
        with pytest.raises(TraceError, match="at most 2"):
            writer.append(rows_of(header_of(), 1, 0, "c"))
