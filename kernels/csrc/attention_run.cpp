// Cuts a step into units of work and shares them between threads.
//
// A *tile* is up to 48 query rows of one sequence and key/value head: they share one pass over the
// keys. A *unit* is the same tile of some heads over all of its keys: of all heads where the rows are
// few, since the heads of a block lie side by side in memory and reading is all the work, of one head
// otherwise. Where there are fewer units than threads could use, they are cut by heads, then by spans;
// whoever ends a unit's last part merges the spans in ascending order.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "attention.h"
#include "attention_write.h"
#include "team.h"

namespace remora_attention {
namespace {

constexpr int64_t TILE_ROWS = 48;
constexpr int64_t TILED_ROWS = 128;   // of a tile of a prompt on tiles of AMX
constexpr int64_t TILED_ROWS_MIN = 16;
constexpr int64_t FEW_ROWS = 8;  // of one head
constexpr int64_t UNITS_PER_THREAD = 2;       // so that a slow thread leaves something to the others
constexpr int64_t SERIAL_PRODUCTS = 500'000;  // below: waking a thread costs more than it saves

struct Unit {
  int32_t sequence, first_row, num_tokens, head, num_heads;
  int64_t low, high;  // keys of the tile
  int64_t from, to;   // keys of this part
  int32_t shared;     // index into `Run::shared`, -1: the unit is whole

  int64_t cost() const { return num_tokens * num_heads * (to - from); }
};

// States of the spans of a unit in several parts, [span, head].
struct Shared {
  std::atomic<int32_t> num_open;  // parts that have not ended
  std::vector<float> memory;

  explicit Shared(int32_t num_parts) : num_open(num_parts) {}
};

// Scratch of one thread, 64-byte aligned, kept between calls.
struct Scratch {
  std::vector<float> memory;
  std::vector<Row> rows;
  std::vector<float> sinks;
  std::vector<Tile> tiles;
  std::vector<State> total, part;

  float* take(size_t count) {
    if (memory.size() < count + 16) memory.resize(count + 16);
    return align(memory.data());
  }
  static float* align(float* p) {
    const auto address = reinterpret_cast<uintptr_t>(p);
    return p + ((64 - address % 64) % 64) / sizeof(float);
  }
};

int64_t first_visible(const Rules& rules, int64_t position) {
  int64_t first = rules.window > 0 ? std::max<int64_t>(0, position - rules.window + 1) : 0;
  if (rules.chunk > 0) first = std::max(first, position / rules.chunk * rules.chunk);
  return first;
}

int64_t round16(int64_t x) { return (x + 15) / 16 * 16; }

int64_t state_floats(int64_t num_rows, int64_t width) {
  return round16(num_rows) * (1 + 16 + width);
}

State state_at(float* memory, int64_t num_rows, int64_t width) {
  const int64_t padded = round16(num_rows);
  return {memory, memory + padded, memory + padded * 17};
}

int64_t num_spans(int64_t from, int64_t to) { return (to - 1) / SPAN_KEYS - from / SPAN_KEYS + 1; }

struct Run {
  const Call& call;
  std::vector<Unit> units;
  std::vector<std::unique_ptr<Shared>> shared;
  std::atomic<int64_t> next{0};
  std::atomic<bool> good{true};

  explicit Run(const Call& c) : call(c) {}

  // Units of every sequence, its last tiles (longest contexts) first. Returns their cost.
  int64_t make_units() {
    const Plan& plan = call.plan;
    const int64_t tile_rows = call.kernel.run_tiled != nullptr ? TILED_ROWS : TILE_ROWS;
    const int64_t tile_tokens = std::max<int64_t>(1, tile_rows / call.group);
    const int64_t num_heads = call.pages.num_heads;
    int64_t cost = 0;
    for (int64_t s = 0; s < plan.num_sequences; ++s) {
      const int64_t begin = plan.query_start[s], end = plan.query_start[s + 1];
      for (int64_t t = (end - begin + tile_tokens - 1) / tile_tokens - 1; t >= 0; --t) {
        const int64_t row = begin + t * tile_tokens, count = std::min(tile_tokens, end - row);
        const int64_t position = plan.start[s] + row - begin;
        const int64_t low = first_visible(call.rules, position), high = position + count;
        const int64_t together = count * call.group <= FEW_ROWS ? num_heads : 1;
        for (int64_t h = 0; h < num_heads; h += together)
          units.push_back(Unit{static_cast<int32_t>(s), static_cast<int32_t>(row),
                               static_cast<int32_t>(count), static_cast<int32_t>(h),
                               static_cast<int32_t>(together), low, high, low, high, -1});
        cost += count * num_heads * (high - low);
      }
    }
    return cost;
  }

  // Replaces units that are more than a fair part of the step by several.
  void cut_units(int64_t cost, int64_t num_threads) {
    const int64_t fair = cost / (num_threads * UNITS_PER_THREAD) + 1;
    std::vector<Unit> whole;
    whole.swap(units);
    for (const Unit& unit : whole) {
      const int64_t wanted = (unit.cost() + fair - 1) / fair;
      const int64_t by_head = std::min<int64_t>(unit.num_heads, wanted);
      const int64_t spans = num_spans(unit.low, unit.high);
      const int64_t by_span = std::min(spans, (wanted + by_head - 1) / by_head);
      const int64_t heads = (unit.num_heads + by_head - 1) / by_head;
      for (int64_t h = 0; h < unit.num_heads; h += heads) {
        Unit some = unit;
        some.head = static_cast<int32_t>(unit.head + h);
        some.num_heads = static_cast<int32_t>(std::min(heads, unit.num_heads - h));
        cut_context(some, spans, (spans + by_span - 1) / by_span);
      }
    }
  }

  void cut_context(const Unit& unit, int64_t spans, int64_t spans_per_part) {
    const int64_t num_parts = (spans + spans_per_part - 1) / spans_per_part;
    if (num_parts == 1) return units.push_back(unit);
    const int64_t floats = state_floats(unit.num_tokens * call.group, call.pages.width);
    for (int64_t i = 0; i < num_parts; ++i) {
      const int64_t from = (unit.low / SPAN_KEYS + i * spans_per_part) * SPAN_KEYS;
      Unit part = unit;
      part.from = std::max(from, unit.low);
      part.to = std::min(from + spans_per_part * SPAN_KEYS, unit.high);
      part.shared = static_cast<int32_t>(shared.size());
      units.push_back(part);
    }
    shared.push_back(std::make_unique<Shared>(static_cast<int32_t>(num_parts)));
    shared.back()->memory.resize(spans * unit.num_heads * floats + 16);
  }

  int64_t slot_of(int64_t sequence, int64_t position) const {
    const int64_t block = call.plan.table[sequence * call.plan.table_width + position / 16];
    return block * 16 + position % 16;
  }

  bool writes_alone(int64_t sequence) const {
    return call.plan.query_start[sequence + 1] - call.plan.query_start[sequence] == 1;
  }

  // Keys and values of sequences with several new rows: all their tiles need them.
  void write_prompts(int64_t num_threads) {
    const Plan& plan = call.plan;
    const Pages& pages = call.pages;
    const bool by_block = call.kernel.write_block != nullptr && pages.v_dim == pages.width &&
                          pages.k_dim * pages.element_bytes % 64 == 0;
    const auto write = [&](int64_t begin, int64_t end) {
      for (int64_t s = 0; s < plan.num_sequences; ++s) {
        if (writes_alone(s)) continue;
        const int64_t last = std::min<int64_t>(end, plan.query_start[s + 1]);
        for (int64_t row = std::max<int64_t>(begin, plan.query_start[s]); row < last;) {
          const int64_t slot = slot_of(s, plan.start[s] + row - plan.query_start[s]);
          const bool whole = by_block && slot % 16 == 0 && row + 16 <= last;
          for (int64_t h = 0; h < call.pages.num_heads; ++h) {
            const char *k = call.k->at(row, h), *v = call.v->at(row, h);
            if (whole)
              call.kernel.write_block(call.pages, slot / 16, h, k, call.k->row_bytes, v,
                                      call.v->row_bytes);
            else
              write_slot(call.pages, slot, h, k, v);
          }
          row += whole ? 16 : 1;
        }
      }
    };
    if (plan.num_tokens == plan.num_sequences) return;
    const int64_t workers = std::min(num_threads, plan.num_tokens / 32);
    if (workers < 2) return write(0, plan.num_tokens);
    remora::team_run(static_cast<int>(workers), [&](int w) {
      write(plan.num_tokens * w / workers, plan.num_tokens * (w + 1) / workers);
    });
  }

  // A lone row of each head reads its keys once: that is memory's work, and other rows' bits.
  bool is_tiled(const Unit& unit) const {
    return call.kernel.run_tiled != nullptr && unit.num_tokens > 1 &&
           unit.num_tokens * call.group >= TILED_ROWS_MIN;
  }

  // Rows and queries of head number `h` of the unit.
  void pack_queries(const Unit& unit, int h, Scratch* scratch) const {
    const Pages& pages = call.pages;
    Tile* tile = &scratch->tiles[h];
    Row* rows = scratch->rows.data() + static_cast<int64_t>(h) * tile->num_rows;
    const int64_t k_bytes = static_cast<int64_t>(pages.k_dim) * pages.element_bytes;
    const int64_t first = call.plan.start[unit.sequence] - call.plan.query_start[unit.sequence];
    const int64_t out_head = static_cast<int64_t>(pages.v_dim) * pages.element_bytes;
    const int64_t rows_max = call.kernel.rows_max, num_heads = pages.num_heads * call.group;
    const bool tiled = is_tiled(unit);
    for (int r = 0; r < tile->num_rows; ++r) {
      const int64_t row = unit.first_row + r / call.group;
      const int64_t head = (unit.head + h) * call.group + r % call.group;
      const int64_t position = first + row;
      rows[r] = Row{position, first_visible(call.rules, position),
                    call.out + (row * num_heads + head) * out_head};
      const int64_t group = r - r % rows_max;
      const int64_t stride = std::min<int64_t>(rows_max, tile->num_rows - group);
      int32_t* packed = tile->q_WR + group * pages.words + r - group;
      const char* q = call.q.at(row, head);
      if (tiled) {
        std::memcpy(tile->q_WR + static_cast<int64_t>(r) * pages.words, q, k_bytes);
        continue;
      }
      const int64_t whole = k_bytes / 4;
      for (int64_t w = 0; w < whole; ++w) std::memcpy(&packed[w * stride], q + w * 4, 4);
      if (whole < pages.words) {
        int32_t last = 0;
        std::memcpy(&last, q + whole * 4, k_bytes - whole * 4);
        packed[whole * stride] = last;
      }
    }
    if (tiled) {
      int32_t* end = tile->q_WR + static_cast<int64_t>(tile->num_rows) * pages.words;
      std::memset(end, 0, (round16(tile->num_rows) - tile->num_rows) * pages.words * 4);
    }
    tile->rows = rows;
  }

  // Lays out the unit's tiles and states in the thread's scratch.
  void open_unit(const Unit& unit, Scratch* scratch) const {
    const Pages& pages = call.pages;
    const int num_rows = static_cast<int>(unit.num_tokens * call.group);
    const int64_t heads = unit.num_heads, floats = state_floats(num_rows, pages.width);
    const int64_t q_words = round16(num_rows) * pages.words;
    const int64_t edge_rows = is_tiled(unit) ? TILE_STEP_KEYS / 2 : 4;
    float* memory = scratch->take(heads * (2 * floats + q_words) + edge_rows * pages.width);
    float* queries = memory + heads * 2 * floats;
    auto* edges = reinterpret_cast<int32_t*>(queries + heads * q_words);
    scratch->tiles.resize(heads);
    scratch->total.resize(heads);
    scratch->part.resize(heads);
    if (static_cast<int64_t>(scratch->rows.size()) < heads * num_rows)
      scratch->rows.resize(heads * num_rows);
    float *total = memory, *part = memory + heads * floats;
    if (unit.shared >= 0) {
      total = Scratch::align(shared[unit.shared]->memory.data());
      part = total + (num_spans(unit.low, unit.from + 1) - 1) * heads * floats;
    }
    for (int h = 0; h < heads; ++h) {
      auto* packed = reinterpret_cast<int32_t*>(queries + h * q_words);
      scratch->tiles[h] = {pages.words, pages.width, num_rows, nullptr, packed, edges};
      scratch->total[h] = state_at(total + h * floats, num_rows, pages.width);
      scratch->part[h] = state_at(part + h * floats, num_rows, pages.width);
      pack_queries(unit, h, scratch);
    }
  }

  void finish(const Unit& unit, Scratch* scratch) const {
    const Pages& pages = call.pages;
    const int num_rows = scratch->tiles[0].num_rows;
    const int64_t floats = state_floats(num_rows, pages.width);
    scratch->sinks.resize(num_rows);
    for (int h = 0; h < unit.num_heads; ++h) {
      const State& total = scratch->total[h];
      int64_t begin = unit.low / SPAN_KEYS * SPAN_KEYS;
      for (int64_t i = 1; unit.shared >= 0 && (begin += SPAN_KEYS) < unit.high; ++i)
        call.kernel.merge(
            total, state_at(total.max_R + i * unit.num_heads * floats, num_rows, pages.width),
            scratch->tiles[h], begin, begin + SPAN_KEYS);
      for (int r = 0; call.sinks != nullptr && r < num_rows; ++r)
        scratch->sinks[r] = call.sinks[(unit.head + h) * call.group + r % call.group];
      call.kernel.finish(total, call.sinks ? scratch->sinks.data() : nullptr, scratch->tiles[h],
                         pages.v_dim);
    }
  }

  bool run_unit(const Unit& unit) {
    static thread_local Scratch scratch;
    const Pages& pages = call.pages;
    open_unit(unit, &scratch);
    const int64_t row = unit.first_row;
    if (call.k != nullptr && unit.to == unit.high && writes_alone(unit.sequence))
      for (int64_t h = unit.head; h < unit.head + unit.num_heads; ++h)
        write_slot(pages, slot_of(unit.sequence, unit.high - 1), h, call.k->at(row, h),
                   call.v->at(row, h));
    const Keys keys{&pages,    call.plan.table + unit.sequence * call.plan.table_width,
                    unit.low,  unit.high,
                    unit.from, unit.to};
    const bool apart = unit.shared >= 0;
    const int64_t part_floats = unit.num_heads * state_floats(scratch.tiles[0].num_rows, pages.width);
    const auto run = is_tiled(unit) ? call.kernel.run_tiled : call.kernel.run;
    const bool done = run(call.rules, keys, scratch.tiles.data(), unit.num_heads, unit.head,
                          scratch.total.data(), scratch.part.data(), apart, part_floats);
    if (!apart || shared[unit.shared]->num_open.fetch_sub(1, std::memory_order_acq_rel) == 1)
      finish(unit, &scratch);
    return done;
  }

  void work() {
    const int64_t num_units = static_cast<int64_t>(units.size());
    for (int64_t i = next++; i < num_units; i = next++)
      if (!run_unit(units[i])) good = false;
  }
};

}  // namespace

bool run_attention(const Call& call) {
  const int64_t num_heads = call.pages.num_heads * call.group;
  const int64_t out_row = num_heads * call.pages.v_dim * call.pages.element_bytes;
  std::memset(call.out + call.plan.num_tokens * out_row, 0,
              (call.plan.num_rows - call.plan.num_tokens) * out_row);
  Run run(call);
  const int64_t cost = run.make_units();
  const int64_t products = cost * call.group * (call.pages.k_dim + call.pages.width);
  const int64_t threads = products < SERIAL_PRODUCTS ? 1 : remora::team_size();
  if (call.k != nullptr) run.write_prompts(threads);
  if (threads > 1) run.cut_units(cost, threads);
  const int64_t workers = std::min<int64_t>(threads, static_cast<int64_t>(run.units.size()));
  if (workers < 2)
    run.work();
  else
    remora::team_run(static_cast<int>(workers), [&](int) { run.work(); });
  return run.good;
}

}  // namespace remora_attention
