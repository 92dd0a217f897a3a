"""Paged causal attention in Triton: the device code. `remora.kernels.gpu_attention` launches it.

A program takes a tile of query rows that share one key/value head of one sequence (some tokens
times the query heads of the group) over *spans* of keys. Spans are absolute, each is begun anew and
merged into what came before it in one order. So long contexts with few queries can be split over
programs (`IS_SPLIT`, then `merge_kernel`) and get what one program gets that walks the spans
itself. A tile holds absolute positions too: with one fixed `Cut` (`exact`) a row is computed in the
same place of the same products, in prefill, in a chunk and in decode. Keys that a row does not see
change nothing: they add exact zeros.

Method: online softmax (Milakov & Gimelshein 2018), over paged keys (Kwon et al. 2023), split over
the context (Flash-Decoding, Dao et al. 2023). Scores are kept in units of log 2, for `exp2`.

Shapes: B tiles, T rows, S sequences, M blocks of a table, H query heads, J key/value heads,
G = H/J, N blocks of the pool, P spans, R rows of a tile, d width.
"""

from remora.kernels.triton_runtime import jit, tl


@jit
def _first_visible(  # type: ignore[no-untyped-def]
    position, window, chunk, HAS_WINDOW: tl.constexpr, HAS_CHUNK: tl.constexpr
):
    """The first key that a row at `position` sees."""
    first = position * 0
    if HAS_WINDOW:
        first = tl.maximum(first, position - window + 1)
    if HAS_CHUNK:
        first = tl.maximum(first, position // chunk * chunk)
    return first


@jit
def _merge(total, weight, maximum, part, part_weight, part_maximum):  # type: ignore[no-untyped-def]
    """A later span into what came before: sums [R, d], weights [R], maxima [R].

    A span of which a row sees nothing has maximum -inf, weight 0, sum 0, and changes no bit.
    """
    new = tl.maximum(maximum, part_maximum)
    shift = tl.where(new == float("-inf"), 0.0, new)
    decay = tl.exp2(maximum - shift)
    growth = tl.exp2(part_maximum - shift)
    total = total * decay[:, None] + part * growth[:, None]
    weight = weight * decay + part_weight * growth
    return total, weight, new


@jit
def _begin(sink_ptr, head, is_row, ROWS: tl.constexpr, HAS_SINKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Weight and maximum before the first key: those of the sink, or nothing."""
    if HAS_SINKS:
        sink = tl.load(sink_ptr + head, mask=is_row, other=0.0).to(tl.float32)
        return tl.full((ROWS,), 1.0, tl.float32), sink * 1.4426950408889634
    else:
        nothing = tl.full((ROWS,), float("-inf"), tl.float32)
        return tl.zeros((ROWS,), tl.float32), nothing


@jit
def _rows(  # type: ignore[no-untyped-def]
    first, start, query_start, end, unit, window, chunk,
    HAS_WINDOW: tl.constexpr, HAS_CHUNK: tl.constexpr,
    GROUP: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Rows of a tile: [R] positions, rows of the step, heads, which are there; keys low..high.

    `unit` numbers the key/value heads, each in as many parts as its group needs tiles.
    """
    parts: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    r = tl.arange(0, HEADS * TOKENS)
    in_group = unit % parts * HEADS + r % HEADS
    position = first + r // HEADS
    is_row = (position >= start) & (position < end) & (in_group < GROUP)
    row = (query_start + position - start).to(tl.int64)
    low = _first_visible(tl.maximum(first, start), window, chunk, HAS_WINDOW, HAS_CHUNK)
    high = tl.minimum(first + TOKENS, end)
    return position, row, unit // parts * GROUP + in_group, is_row, low, high


@jit
def _span(  # type: ignore[no-untyped-def]
    q, k_ptr, v_ptr, table_ptr, position, low_row, span, low, high, kv_head, num_kv_heads,
    scale, soft_cap, HAS_CAP: tl.constexpr, ROWS: tl.constexpr,
    K_DIM: tl.constexpr, V_DIM: tl.constexpr, K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    KEYS: tl.constexpr, SPAN: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Sum [R, d], weight [R] and maximum [R] over the keys of one span, begun anew."""
    i = tl.arange(0, K_WIDTH)
    j = tl.arange(0, V_WIDTH)
    total = tl.zeros((ROWS, V_WIDTH), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    key_first = tl.maximum(span * SPAN, low // KEYS * KEYS)
    for key in range(key_first, tl.minimum(span * SPAN + SPAN, high), KEYS):
        key_position = key + tl.arange(0, KEYS)
        is_key = (key_position >= low) & (key_position < high)  # others may be stale: NaN
        block = tl.load(table_ptr + key_position // PAGE, mask=is_key, other=0).to(tl.int64)
        place = (block * num_kv_heads + kv_head) * PAGE + key_position % PAGE
        is_k = is_key[None, :] & (i < K_DIM)[:, None]
        k = tl.load(k_ptr + place[None, :] * K_DIM + i[:, None], mask=is_k, other=0.0)
        score = tl.dot(q, k, input_precision="ieee") * scale
        if HAS_CAP:  # tanh(x) = 1 - 2 / (exp(2x) + 1)
            bent = 1.0 - 2.0 / (tl.exp2(score * (2.8853900817779268 / soft_cap)) + 1.0)
            score = bent * soft_cap
        score *= 1.4426950408889634
        is_seen = is_key[None, :] & (key_position[None, :] <= position[:, None])
        is_seen = is_seen & (key_position[None, :] >= low_row[:, None])
        score = tl.where(is_seen, score, float("-inf"))
        new = tl.maximum(maximum, tl.max(score, axis=1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(score - shift[:, None])
        decay = tl.exp2(maximum - shift)
        weight = weight * decay + tl.sum(p, axis=1)
        is_v = is_key[:, None] & (j < V_DIM)[None, :]
        v = tl.load(v_ptr + place[:, None] * V_DIM + j[None, :], mask=is_v, other=0.0)
        total = tl.dot(p.to(v.dtype), v, total * decay[:, None], input_precision="ieee")
        maximum = new
    return total, weight, maximum


@jit
def attend_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, sink_ptr, out_ptr, part_ptr, part_weight_ptr, part_maximum_ptr,
    tile_seq_ptr, tile_first_ptr, start_ptr, query_start_ptr, table_ptr,
    q_row_stride, q_head_stride, table_stride, num_heads, num_kv_heads, num_spans,
    scale, window, chunk, soft_cap,
    HAS_SINKS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CHUNK: tl.constexpr,
    HAS_CAP: tl.constexpr, IS_SPLIT: tl.constexpr,
    GROUP: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    K_DIM: tl.constexpr, V_DIM: tl.constexpr, K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    KEYS: tl.constexpr, SPAN: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one key/value head: over one span, or over all of them."""
    ROWS: tl.constexpr = HEADS * TOKENS
    tile = tl.program_id(0)
    sequence = tl.load(tile_seq_ptr + tile)
    if sequence < 0:
        return
    kv_head = tl.program_id(1) // ((GROUP + HEADS - 1) // HEADS)
    start = tl.load(start_ptr + sequence)
    query_start = tl.load(query_start_ptr + sequence)
    end = start + tl.load(query_start_ptr + sequence + 1) - query_start
    position, row, head, is_row, low, high = _rows(
        tl.load(tile_first_ptr + tile), start, query_start, end, tl.program_id(1), window, chunk,
        HAS_WINDOW, HAS_CHUNK, GROUP, HEADS, TOKENS,
    )  # fmt: skip
    low_row = _first_visible(position, window, chunk, HAS_WINDOW, HAS_CHUNK)
    span_first = low // SPAN
    span_stop = (high + SPAN - 1) // SPAN
    if IS_SPLIT:
        span_first = tl.maximum(span_first, tl.program_id(2))
        span_stop = tl.minimum(span_stop, tl.program_id(2) + 1)
        if span_first >= span_stop:
            return
    i = tl.arange(0, K_WIDTH)
    q_place = q_ptr + row[:, None] * q_row_stride + head[:, None] * q_head_stride + i[None, :]
    q = tl.load(q_place, mask=is_row[:, None] & (i < K_DIM)[None, :], other=0.0)
    table = table_ptr + sequence.to(tl.int64) * table_stride
    total = tl.zeros((ROWS, V_WIDTH), tl.float32)
    weight, maximum = _begin(sink_ptr, head, is_row, ROWS, HAS_SINKS)
    for span in range(span_first, span_stop):
        part, part_weight, part_maximum = _span(
            q, k_ptr, v_ptr, table, position, low_row, span, low, high, kv_head, num_kv_heads,
            scale, soft_cap, HAS_CAP, ROWS, K_DIM, V_DIM, K_WIDTH, V_WIDTH, KEYS, SPAN, PAGE,
        )  # fmt: skip
        if IS_SPLIT:
            total, weight, maximum = part, part_weight, part_maximum
        else:
            total, weight, maximum = _merge(total, weight, maximum, part, part_weight, part_maximum)
    j = tl.arange(0, V_WIDTH)
    is_out = is_row[:, None] & (j < V_DIM)[None, :]
    if IS_SPLIT:
        unit = (tile.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * num_spans
        place = (unit + tl.program_id(2)) * ROWS + tl.arange(0, ROWS)
        tl.store(part_weight_ptr + place, weight, mask=is_row)
        tl.store(part_maximum_ptr + place, maximum, mask=is_row)
        tl.store(part_ptr + place[:, None] * V_DIM + j[None, :], total, mask=is_out)
    else:
        out = out_ptr + (row[:, None] * num_heads + head[:, None]) * V_DIM + j[None, :]
        tl.store(out, (total / weight[:, None]).to(out_ptr.dtype.element_ty), mask=is_out)


@jit
def merge_kernel(  # type: ignore[no-untyped-def]
    sink_ptr, out_ptr, part_ptr, part_weight_ptr, part_maximum_ptr,
    tile_seq_ptr, tile_first_ptr, start_ptr, query_start_ptr,
    num_heads, num_spans, window, chunk,
    HAS_SINKS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CHUNK: tl.constexpr,
    GROUP: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    V_DIM: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """The spans of one tile, in order; one program a tile, key/value head and block of columns."""
    ROWS: tl.constexpr = HEADS * TOKENS
    tile = tl.program_id(0)
    sequence = tl.load(tile_seq_ptr + tile)
    if sequence < 0:
        return
    start = tl.load(start_ptr + sequence)
    query_start = tl.load(query_start_ptr + sequence)
    end = start + tl.load(query_start_ptr + sequence + 1) - query_start
    _, row, head, is_row, low, high = _rows(
        tl.load(tile_first_ptr + tile), start, query_start, end, tl.program_id(1), window, chunk,
        HAS_WINDOW, HAS_CHUNK, GROUP, HEADS, TOKENS,
    )  # fmt: skip
    j = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    is_out = is_row[:, None] & (j < V_DIM)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    weight, maximum = _begin(sink_ptr, head, is_row, ROWS, HAS_SINKS)
    unit = (tile.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * num_spans
    for span in range(low // SPAN, (high + SPAN - 1) // SPAN):
        place = (unit + span) * ROWS + tl.arange(0, ROWS)
        part_weight = tl.load(part_weight_ptr + place, mask=is_row, other=0.0)
        part_maximum = tl.load(part_maximum_ptr + place, mask=is_row, other=float("-inf"))
        part = tl.load(part_ptr + place[:, None] * V_DIM + j[None, :], mask=is_out, other=0.0)
        total, weight, maximum = _merge(total, weight, maximum, part, part_weight, part_maximum)
    out = out_ptr + (row[:, None] * num_heads + head[:, None]) * V_DIM + j[None, :]
    tl.store(out, (total / weight[:, None]).to(out_ptr.dtype.element_ty), mask=is_out)
