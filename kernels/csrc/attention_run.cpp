// Cuts a step into units of work and shares them between threads.
//
// A *tile* is up to 48 query rows of one sequence and key/value head: they share one pass over the
// keys. A *unit* is a tile over all of its keys, or, where there are fewer tiles than threads could
// use, over some spans of them; whoever ends a tile's last unit merges the spans in ascending order.
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
constexpr int64_t UNITS_PER_THREAD = 2;       // so that a slow thread leaves something to the others
constexpr int64_t SERIAL_PRODUCTS = 500'000;  // below: waking a thread costs more than it saves

struct Unit {
  int32_t sequence, first_row, num_tokens, head;
  int64_t low, high;  // keys of the whole tile
  int64_t from, to;   // keys of the unit
  int32_t tile;       // index of the cut tile, -1: the unit is a whole one
};

// A tile that several units share.
struct CutTile {
  std::atomic<int32_t> num_open;  // units that have not ended
  std::vector<float> memory;      // states of the spans

  explicit CutTile(int32_t num_units) : num_open(num_units) {}
};

// Scratch of one thread, 64-byte aligned, kept between calls.
struct Scratch {
  std::vector<float> memory;
  std::vector<Row> rows;
  std::vector<float> sinks;

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
  std::vector<std::unique_ptr<CutTile>> cut;
  std::atomic<int64_t> next{0};
  std::atomic<bool> good{true};

  explicit Run(const Call& c) : call(c) {}

  // Tiles of every sequence and key/value head, the last (longest contexts) first.
  int64_t make_tiles() {
    const Plan& plan = call.plan;
    const int64_t tile_tokens = std::max<int64_t>(1, TILE_ROWS / call.group);
    int64_t num_keys = 0;
    for (int64_t s = 0; s < plan.num_sequences; ++s) {
      const int64_t begin = plan.query_start[s], end = plan.query_start[s + 1];
      for (int64_t t = (end - begin + tile_tokens - 1) / tile_tokens - 1; t >= 0; --t) {
        const int64_t row = begin + t * tile_tokens, count = std::min(tile_tokens, end - row);
        const int64_t position = plan.start[s] + row - begin;
        const int64_t low = first_visible(call.rules, position), high = position + count;
        num_keys += count * (high - low);
        for (int64_t h = 0; h < call.pages.num_heads; ++h)
          units.push_back(Unit{static_cast<int32_t>(s), static_cast<int32_t>(row),
                               static_cast<int32_t>(count), static_cast<int32_t>(h), low, high, low,
                               high, -1});
      }
    }
    return num_keys * call.pages.num_heads;
  }

  // Replaces tiles that are more than a fair part of the step by several units.
  void cut_tiles(int64_t num_keys, int64_t num_threads) {
    const int64_t fair = num_keys / (num_threads * UNITS_PER_THREAD) + 1;
    std::vector<Unit> whole;
    whole.swap(units);
    for (const Unit& tile : whole) {
      const int64_t spans = num_spans(tile.low, tile.high);
      const int64_t cost = tile.num_tokens * (tile.high - tile.low);
      const int64_t parts = std::min(spans, (cost + fair - 1) / fair);
      if (parts < 2) {
        units.push_back(tile);
        continue;
      }
      const int64_t per_unit = (spans + parts - 1) / parts * SPAN_KEYS;
      const int64_t first = tile.low / SPAN_KEYS * SPAN_KEYS;
      const size_t before = units.size();
      for (int64_t from = first; from < tile.high; from += per_unit) {
        Unit unit = tile;
        unit.from = std::max(from, tile.low);
        unit.to = std::min(from + per_unit, tile.high);
        unit.tile = static_cast<int32_t>(cut.size());
        units.push_back(unit);
      }
      cut.push_back(std::make_unique<CutTile>(static_cast<int32_t>(units.size() - before)));
      cut.back()->memory.resize(
          spans * state_floats(tile.num_tokens * call.group, call.pages.width) + 16);
    }
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
    const auto write = [&](int64_t begin, int64_t end) {
      for (int64_t s = 0; s < plan.num_sequences; ++s) {
        if (writes_alone(s)) continue;
        const int64_t last = std::min<int64_t>(end, plan.query_start[s + 1]);
        for (int64_t row = std::max<int64_t>(begin, plan.query_start[s]); row < last; ++row) {
          const int64_t slot = slot_of(s, plan.start[s] + row - plan.query_start[s]);
          for (int64_t h = 0; h < call.pages.num_heads; ++h)
            write_slot(call.pages, slot, h, call.k->at(row, h), call.v->at(row, h));
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

  void pack_queries(const Unit& unit, int num_rows, Tile* tile, Scratch* scratch) const {
    const Pages& pages = call.pages;
    const int64_t k_bytes = static_cast<int64_t>(pages.k_dim) * pages.element_bytes;
    const int64_t first = call.plan.start[unit.sequence] - call.plan.query_start[unit.sequence];
    const int64_t out_head = static_cast<int64_t>(pages.v_dim) * pages.element_bytes;
    const int64_t rows_max = call.kernel.rows_max, num_heads = pages.num_heads * call.group;
    for (int r = 0; r < num_rows; ++r) {
      const int64_t row = unit.first_row + r / call.group;
      const int64_t head = unit.head * call.group + r % call.group;
      const int64_t position = first + row;
      scratch->rows[r] = Row{position, first_visible(call.rules, position),
                             call.out + (row * num_heads + head) * out_head};
      const int64_t group = r - r % rows_max;
      const int64_t stride = std::min<int64_t>(rows_max, num_rows - group);
      int32_t* packed = tile->q_WR + group * pages.words + r - group;
      const char* q = call.q.at(row, head);
      const int64_t whole = k_bytes / 4;
      for (int64_t w = 0; w < whole; ++w) std::memcpy(&packed[w * stride], q + w * 4, 4);
      if (whole < pages.words) {
        int32_t last = 0;
        std::memcpy(&last, q + whole * 4, k_bytes - whole * 4);
        packed[whole * stride] = last;
      }
      if (call.sinks != nullptr) scratch->sinks[r] = call.sinks[head];
    }
    tile->rows = scratch->rows.data();
  }

  bool run_unit(const Unit& unit) {
    static thread_local Scratch scratch;
    const Pages& pages = call.pages;
    const int num_rows = static_cast<int>(unit.num_tokens * call.group);
    const int64_t floats = state_floats(num_rows, pages.width);
    float* memory = scratch.take(2 * floats + round16(num_rows * pages.words) + 2 * pages.width);
    State total = state_at(memory, num_rows, pages.width);
    State part = state_at(memory + floats, num_rows, pages.width);
    Tile tile{pages.words, pages.width, num_rows, nullptr, nullptr, nullptr};
    tile.edge_2V = reinterpret_cast<int32_t*>(memory + 2 * floats);
    tile.q_WR = tile.edge_2V + 2 * pages.width;
    if (static_cast<int>(scratch.rows.size()) < num_rows) {
      scratch.rows.resize(num_rows);
      scratch.sinks.resize(num_rows);
    }
    pack_queries(unit, num_rows, &tile, &scratch);
    if (call.k != nullptr && unit.to == unit.high && writes_alone(unit.sequence))
      write_slot(pages, slot_of(unit.sequence, unit.high - 1), unit.head,
                 call.k->at(unit.first_row, unit.head), call.v->at(unit.first_row, unit.head));
    CutTile* shared = unit.tile < 0 ? nullptr : cut[unit.tile].get();
    if (shared != nullptr) {
      total = state_at(Scratch::align(shared->memory.data()), num_rows, pages.width);
      part = state_at(total.max_R + num_spans(unit.low, unit.from + 1) * floats - floats, num_rows,
                      pages.width);
    }
    const int32_t* table = call.plan.table + unit.sequence * call.plan.table_width;
    const bool done = call.kernel.run(call.rules, pages, table, tile, unit.head, unit.low, unit.high,
                                      unit.from, unit.to, total, part, shared != nullptr, floats);
    if (shared != nullptr) {
      if (shared->num_open.fetch_sub(1, std::memory_order_acq_rel) > 1) return done;
      int64_t begin = unit.low / SPAN_KEYS * SPAN_KEYS;
      for (int64_t i = 1; (begin += SPAN_KEYS) < unit.high; ++i)
        call.kernel.merge(total, state_at(total.max_R + i * floats, num_rows, pages.width), tile,
                          begin, begin + SPAN_KEYS);
    }
    call.kernel.finish(total, call.sinks ? scratch.sinks.data() : nullptr, tile, pages.v_dim);
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
  const int64_t num_keys = run.make_tiles();
  const int64_t products = num_keys * call.group * (call.pages.k_dim + call.pages.width);
  const int64_t threads = products < SERIAL_PRODUCTS ? 1 : remora::team_size();
  if (call.k != nullptr) run.write_prompts(threads);
  if (threads > 1) run.cut_tiles(num_keys, threads);
  const int64_t workers = std::min<int64_t>(threads, static_cast<int64_t>(run.units.size()));
  if (workers < 2)
    run.work();
  else
    remora::team_run(static_cast<int>(workers), [&](int) { run.work(); });
  return run.good;
}

}  // namespace remora_attention
