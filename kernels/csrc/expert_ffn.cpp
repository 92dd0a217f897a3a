// See expert_ffn.h. One region of the team. With many blocks to go round a task is a whole block, up,
// gate and down, so that weights are long streams of memory. With few, each is cut: the pieces of all
// `up` first, which wait for nothing, then those of `down`, which wait for the `up` of their block.
// Last come the sums, which wait for all of `down`. Tasks that wait are taken in order, once none is
// left that does not: others hold what they wait for already, so somebody always moves.
#include "expert_ffn.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <optional>

#include "expert_order.h"
#include "panel.h"
#include "phase.h"
#include "rows.h"
#include "task_runs.h"
#include "team.h"

namespace remora {
namespace {

constexpr int64_t kDownTaskBytes = 96 << 10;    // of weights; smaller ones cost more than they balance
constexpr int64_t kBlocksPerWorker = 6;         // from so many on a block is one task
constexpr int64_t kSumElements = 1 << 14;       // of one task of sums

// How the columns of `up` are cut: into pieces that hold both halves of what a gate needs.
struct UpUnits {
  int64_t num_units;
  int64_t groups[2];    // first groups of a unit's parts, one unit further on: + 1
  int num_parts;        // 2 where gates and ups lie in different groups
  bool whole;           // one unit: all columns
  int64_t tile_columns;
};

UpUnits up_units(const ExpertLayer& layer) {
  const PackedShape& up = layer.up.shape;
  const int64_t width = layer.down.shape.num_inputs;
  if (layer.gate.layout != GateLayout::kConcatenated) {
    return {up.num_groups(), {0, 0}, 1, false, kGroup};
  }
  if (width % kGroup == 0) return {width / kGroup, {0, width / kGroup}, 2, false, 2 * kGroup};
  return {1, {0, 0}, 1, true, up.num_outputs};
}

// What one worker has of its own. What a block puts down between its steps is as small as a block and
// stays in the second cache, so that weights are all that comes from memory.
struct Worker {
  char* tile;             // columns of `up` before the gate; a row of sums
  char* rows;             // those of `gathered`, one behind the other; none where nobody wants that
  char* hidden;           // of a whole block
  char* outs;             // of a whole block
  int64_t gathered = -1;  // first place of a block
};

// Bytes of each of those.
struct WorkerSizes {
  int64_t tile;
  int64_t rows;
  int64_t hidden;
  int64_t outs;

  int64_t sum() const { return tile + rows + hidden + outs; }
};

struct Run {
  const ExpertLayer& layer;
  ExpertScratch& scratch;
  const RemoraExpertCall* calls;
  UpUnits units;
  bool whole_blocks;    // a block is one task
  int64_t down_groups;  // of one task
  int64_t down_tasks;   // of one block
  int64_t num_up_tasks;
  int64_t num_down_tasks;
  PanelKernel kernel;
  char* hidden;  // of all pairs, where blocks are cut
  char* outputs;
  char* own;     // what workers have, one behind the other
  WorkerSizes sizes;
  std::optional<TaskRuns> up_runs;
  std::atomic<int64_t> next{0};  // task behind those of `up`
  std::atomic<int64_t> down_left{0};
  std::atomic<bool> failed{false};  // a worker has: what others wait for may never come

  int64_t size() const { return layer.up.shape.element_size(); }

  // Elements between rows of a worker's own: a line more than they have, else lines of many rows
  // share a set of the first cache (widths are powers of two more often than not).
  int64_t own_stride(int64_t elements) const { return elements + kLineBytes / size(); }
  int64_t gather_stride() const { return own_stride(layer.up.shape.num_inputs); }
  int64_t hidden_stride() const { return own_stride(layer.down.shape.padded_inputs()); }
  int64_t outs_stride() const { return own_stride(layer.down.shape.num_outputs); }

  // The block's rows between `up` and `down`.
  char* hidden_rows(const ExpertScratch::Block& block, const Worker& worker) const {
    return whole_blocks ? worker.hidden : hidden + block.row * hidden_stride() * size();
  }

  // The group's weights, for asking ahead; null behind the last one.
  static const void* start_of(const SlotWeights& weights, int64_t slot, int64_t group) {
    return group < weights.shape.num_groups() ? weights.group_call(slot, group).weights : nullptr;
  }

  // A worker keeps the rows of its last block: all units of a block want the same ones.
  const char* gathered_rows(const ExpertScratch::Block& block, Worker& worker) {
    const void* const* from = scratch.x_rows.data() + block.row;
    if (block.num_rows == 1) return static_cast<const char*>(from[0]);
    if (worker.gathered != block.row) {
      const int64_t row_bytes = layer.up.shape.num_inputs * size();
      for (int64_t row = 0; row < block.num_rows; ++row) {
        std::memcpy(worker.rows + row * gather_stride() * size(), from[row], row_bytes);
      }
      worker.gathered = block.row;
    }
    return worker.rows;
  }

  void up_columns(const ExpertScratch::Block& block, int64_t group, const void* next,
                  Worker& worker, char* out) {
    PanelCall call = layer.up.group_call(block.slot, group);
    if (sizes.rows != 0) {
      call.x = gathered_rows(block, worker);
      call.x_stride = gather_stride();
    } else {
      call.x_rows = scratch.x_rows.data() + block.row;
    }
    call.num_rows = block.num_rows;
    call.out = out;
    call.out_stride = units.tile_columns;
    call.next = next;
    kernel(call);
  }

  // One unit of `up`, and what the gate makes of it.
  void up(const ExpertScratch::Block& block, int64_t unit, const void* next, Worker& worker) {
    const PackedShape& down = layer.down.shape;
    const int64_t num_groups = units.whole ? layer.up.shape.num_groups() : units.num_parts;
    for (int64_t part = 0; part < num_groups; ++part) {
      const int64_t group = units.whole ? part : units.groups[part] + unit;
      const int64_t after = units.whole ? group + 1 : units.groups[(part + 1) % 2] + unit;
      const bool last = part + 1 == num_groups;
      up_columns(block, group, last ? next : start_of(layer.up, block.slot, after),
                 worker, worker.tile + part * kGroup * size());
    }
    int64_t width = down.num_inputs;  // columns of `down`'s input that this unit makes
    int64_t column = 0;
    if (!units.whole) {
      const int64_t columns = units.num_parts == 2 ? kGroup : kGroup / layer.gate.columns();
      column = unit * columns;
      width = std::min(columns, down.num_inputs - column);
    }
    char* target = hidden_rows(block, worker) + column * size();
    gate_rows(layer.gate, down.bfloat16(), worker.tile, units.tile_columns, target, hidden_stride(),
              block.num_rows, width);
    if (column + width == down.num_inputs && down.padded_inputs() != down.num_inputs) {
      const int64_t padding = (down.padded_inputs() - down.num_inputs) * size();
      for (int64_t row = 0; row < block.num_rows; ++row) {
        std::memset(target + (row * hidden_stride() + width) * size(), 0, padding);
      }
    }
  }

  void down(const ExpertScratch::Block& block, int64_t first, int64_t num_groups, const void* next,
            const Worker& worker) {
    const PackedShape& shape = layer.down.shape;
    const int64_t end = std::min(first + num_groups, shape.num_groups());
    for (int64_t group = first; group < end; ++group) {
      PanelCall call = layer.down.group_call(block.slot, group);
      call.x = hidden_rows(block, worker);
      call.x_stride = hidden_stride();
      call.num_rows = block.num_rows;
      if (whole_blocks) {
        call.out = worker.outs + group * kGroup * size();
        call.out_stride = outs_stride();
      } else {
        call.out_rows = scratch.out_rows.data() + block.row;
        call.out_column = group * kGroup;
      }
      const void* after = start_of(layer.down, block.slot, group + 1);
      call.next = after != nullptr ? after : next;
      kernel(call);
    }
    if (whole_blocks) {
      // Row by row: a group's columns of many rows would each wait for a line of their own.
      for (int64_t row = 0; row < block.num_rows; ++row) {
        std::memcpy(scratch.out_rows[block.row + row], worker.outs + row * outs_stride() * size(),
                    shape.num_outputs * size());
      }
    }
    down_left.fetch_sub(1, std::memory_order_release);
  }

  // `after`: the task that this worker takes afterwards, or null.
  void up_task(const ExpertScratch::Task& task, const ExpertScratch::Task* after, Worker& worker) {
    const ExpertScratch::Block& block = scratch.blocks[task.block];
    const void* next = after == nullptr ? nullptr
                                        : start_of(layer.up, scratch.blocks[after->block].slot,
                                                   units.groups[0] + after->unit);
    if (!whole_blocks) {
      up(block, task.unit, next, worker);
      scratch.left[task.block].fetch_sub(1, std::memory_order_release);
      return;
    }
    for (int64_t unit = 0; unit < units.num_units; ++unit) {
      const bool last = unit + 1 == units.num_units;
      up(block, unit, last ? start_of(layer.down, block.slot, 0)
                           : start_of(layer.up, block.slot, units.groups[0] + unit + 1), worker);
    }
    down(block, 0, layer.down.shape.num_groups(), next, worker);
  }

  // Waits until none is left; false where that will never be.
  template <class Count>
  bool none_left(const std::atomic<Count>& left) const {
    spin_until([&] {
      return left.load(std::memory_order_acquire) == 0 || failed.load(std::memory_order_relaxed);
    });
    return !failed.load(std::memory_order_relaxed);
  }

  void down_task(const ExpertScratch::Task& task, const Worker& worker) {
    if (!none_left(scratch.left[task.block])) return;
    down(scratch.blocks[task.block], task.unit * down_groups, down_groups, nullptr, worker);
  }

  template <class S>
  void sum_rows(const RemoraExpertCall& call, int64_t first_term_row, int64_t begin, int64_t end,
                float* sum) {
    const int64_t width = layer.down.shape.num_outputs;
    const S* from = reinterpret_cast<const S*>(outputs);
    for (int64_t row = begin; row < end; ++row) {
      std::fill_n(sum, width, 0.0f);
      const int64_t* start = scratch.term_start.data() + first_term_row + row;
      for (int64_t j = start[0]; j < start[1]; ++j) {
        add_row(sum, from + scratch.term_place[j] * width, scratch.term_weight[j], width);
      }
      round_row(sum, static_cast<S*>(call.out) + row * width, width);
    }
  }

  void sum(const ExpertScratch::Task& task, char* tile) {
    const RemoraExpertCall& call = calls[task.block];
    const int64_t begin = task.unit;
    const int64_t end = std::min(call.num_rows, begin + sum_grain());
    if (!none_left(down_left)) return;
    const int64_t first = scratch.call_start[task.block];
    float* sums = reinterpret_cast<float*>(tile);
    if (layer.up.shape.bfloat16()) {
      sum_rows<uint16_t>(call, first, begin, end, sums);
    } else {
      sum_rows<float>(call, first, begin, end, sums);
    }
  }

  int64_t sum_grain() const {
    return std::max<int64_t>(1, kSumElements / layer.down.shape.num_outputs);
  }

  void work(int number) {
    try {
      take_tasks(number);
    } catch (...) {
      failed.store(true, std::memory_order_relaxed);
      throw;
    }
  }

  void take_tasks(int number) {
    Worker worker;
    worker.tile = own + number * sizes.sum();
    worker.rows = worker.tile + sizes.tile;
    worker.hidden = worker.rows + sizes.rows;
    worker.outs = worker.hidden + sizes.hidden;
    for (auto taken = up_runs->take(number); taken.task >= 0; taken = up_runs->take(number)) {
      up_task(scratch.tasks[taken.task], taken.next < 0 ? nullptr : &scratch.tasks[taken.next], worker);
    }
    const int64_t num_tasks = static_cast<int64_t>(scratch.tasks.size());
    for (int64_t i = next.fetch_add(1); i < num_tasks; i = next.fetch_add(1)) {
      const ExpertScratch::Task& task = scratch.tasks[i];
      if (i < num_up_tasks + num_down_tasks) {
        down_task(task, worker);
      } else {
        sum(task, worker.tile);
      }
    }
  }
};

void add_tasks(Run& run, int32_t num_calls) {
  ExpertScratch& s = run.scratch;
  const int32_t num_blocks = static_cast<int32_t>(s.blocks.size());
  s.tasks.clear();
  const int32_t up_tasks = run.whole_blocks ? 1 : static_cast<int32_t>(run.units.num_units);
  const int32_t down_tasks = run.whole_blocks ? 0 : static_cast<int32_t>(run.down_tasks);
  for (int32_t block = 0; block < num_blocks; ++block) {
    for (int32_t unit = 0; unit < up_tasks; ++unit) s.tasks.push_back({block, unit});
  }
  run.num_up_tasks = static_cast<int64_t>(s.tasks.size());
  for (int32_t block = 0; block < num_blocks; ++block) {
    for (int32_t unit = 0; unit < down_tasks; ++unit) s.tasks.push_back({block, unit});
  }
  run.num_down_tasks = static_cast<int64_t>(s.tasks.size()) - run.num_up_tasks;
  for (int32_t c = 0; c < num_calls; ++c) {
    if (!run.calls[c].presummed) continue;
    for (int64_t row = 0; row < run.calls[c].num_rows; row += run.sum_grain()) {
      s.tasks.push_back({c, static_cast<int32_t>(row)});
    }
  }
  if (num_blocks > s.num_left) {
    s.left = std::make_unique<std::atomic<int32_t>[]>(2 * num_blocks);
    s.num_left = 2 * num_blocks;
  }
  for (int32_t block = 0; block < num_blocks; ++block) {
    s.left[block].store(static_cast<int32_t>(run.units.num_units), std::memory_order_relaxed);
  }
  run.down_left.store(run.whole_blocks ? num_blocks : run.num_down_tasks, std::memory_order_relaxed);
}

int run_checked(const ExpertLayer& layer, ExpertScratch& scratch, const RemoraExpertCall* calls,
                int32_t num_calls) {
  int64_t num_pairs = 0;
  bool any_sums = false;
  for (int32_t c = 0; c < num_calls; ++c) {
    num_pairs += calls[c].num_pairs;
    any_sums = any_sums || calls[c].presummed;
  }
  sort_pairs(layer, scratch, calls, num_calls, num_pairs);
  sort_terms(scratch, calls, num_calls);

  const PackedShape& up = layer.up.shape;
  const PackedShape& down = layer.down.shape;
  Run run{layer, scratch, calls};
  run.units = up_units(layer);
  const int64_t group_bytes = down.group_nbytes(kGroupPanels);
  run.down_groups = std::clamp<int64_t>(kDownTaskBytes / group_bytes, 1, down.num_groups());
  run.down_tasks = (down.num_groups() + run.down_groups - 1) / run.down_groups;
  run.kernel = panel_kernel(up.format);

  const int64_t num_blocks = static_cast<int64_t>(scratch.blocks.size());
  const int64_t cost =
      num_blocks * (up.packed_nbytes() + down.packed_nbytes()) +
      num_pairs * (up.num_inputs * up.num_outputs + down.num_inputs * down.num_outputs) / kMacsPerByte;
  const int num_workers = team_workers(cost, num_blocks * (run.units.num_units + run.down_tasks));
  run.whole_blocks = num_workers == 1 || num_blocks >= kBlocksPerWorker * num_workers;
  add_tasks(run, num_calls);
  run.up_runs.emplace(run.num_up_tasks, num_workers);
  run.next.store(run.num_up_tasks, std::memory_order_relaxed);
  int64_t tallest = 0;
  for (const auto& block : scratch.blocks) tallest = std::max(tallest, block.num_rows);
  const auto in_lines = [&](int64_t elements) {
    return (elements * up.element_size() + 127) / 128 * 128;
  };
  const int64_t whole = run.whole_blocks ? tallest : 0;
  run.sizes.tile = std::max(in_lines(tallest * run.units.tile_columns),
                            in_lines(down.num_outputs * static_cast<int64_t>(sizeof(float))));
  run.sizes.rows = panel_is_tiled(up.format) ? in_lines(tallest * run.gather_stride()) : 0;
  run.sizes.hidden = in_lines(whole * run.hidden_stride());
  run.sizes.outs = in_lines(whole * run.outs_stride());
  run.own = scratch.own.take(num_workers * run.sizes.sum());
  const int64_t cut_pairs = run.whole_blocks ? 0 : num_pairs;
  run.hidden = scratch.hidden.take(cut_pairs * run.hidden_stride() * down.element_size());
  run.outputs =
      scratch.outputs.take(any_sums ? num_pairs * down.num_outputs * down.element_size() : 0);
  const bool outputs_missing = any_sums && num_pairs > 0 && run.outputs == nullptr;
  if (run.own == nullptr || (cut_pairs > 0 && run.hidden == nullptr) || outputs_missing) {
    return REMORA_EXPERTS_NO_MEMORY;
  }
  const int64_t out_bytes = down.num_outputs * down.element_size();
  for (int64_t place = 0; place < num_pairs; ++place) {
    if (scratch.out_rows[place] == nullptr) scratch.out_rows[place] = run.outputs + place * out_bytes;
  }
  team_run(num_workers, [&](int worker) { run.work(worker); });
  return REMORA_EXPERTS_DONE;
}

}  // namespace

int run_experts(const ExpertLayer& layer, ExpertScratch& scratch, const RemoraExpertCall* calls,
                int32_t num_calls) {
  const PhaseTimer timer(Phase::kExperts);
  const int verdict = check_calls(layer, calls, num_calls);
  if (verdict != REMORA_EXPERTS_DONE) return verdict;
  try {
    return run_checked(layer, scratch, calls, num_calls);
  } catch (const std::bad_alloc&) {  // some rows may be written: whoever is asked next writes all
    return REMORA_EXPERTS_NO_MEMORY;
  }
}

}  // namespace remora
