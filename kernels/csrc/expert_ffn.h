// All experts of one layer that some rows chose, in one go: up, gate, down, and the weighted sums.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "buffer.h"
#include "expert_call.h"
#include "gates.h"
#include "packed_shape.h"

namespace remora {

// One projection of all slots.
struct SlotWeights {
  PackedShape shape;
  const char* packed;  // [S, packed_nbytes]
  const char* bias;    // [S, O] in the dtype of the rows, or null

  PanelCall group_call(int64_t slot, int64_t group) const {
    const char* slot_bias =
        bias == nullptr ? nullptr : bias + slot * shape.num_outputs * shape.element_size();
    return shape.group_call(group, packed + slot * shape.packed_nbytes(), slot_bias);
  }
};

struct ExpertLayer {
  SlotWeights up;    // [columns() * I, D]
  SlotWeights down;  // [D, I]
  Gate gate;
  int64_t num_slots;
  int64_t num_experts;
  const int64_t* slot_of_expert;  // [num_experts], -1 where it is not held; read at every call
};

struct ExpertScratch {
  // Rows of one slot, at most a block's worth.
  struct Block {
    int64_t slot;
    int64_t row;  // in slot order
    int64_t num_rows;
  };
  struct Task {
    int32_t block;  // or call, in the last phase
    int32_t unit;   // or first row
  };

  std::vector<int64_t> next;           // [S + 1] of the counting sort
  std::vector<int64_t> place;          // pair -> place in slot order
  std::vector<const void*> x_rows;     // place -> row that came
  std::vector<void*> out_rows;         // place -> where its output goes
  std::vector<Block> blocks;
  std::vector<Task> tasks;
  std::unique_ptr<std::atomic<int32_t>[]> left;  // of each block: units of `up` not yet done
  int64_t num_left = 0;
  std::vector<int64_t> term_start;     // [rows of all presummed calls + 1]
  std::vector<int64_t> term_place;
  std::vector<float> term_weight;
  std::vector<int64_t> call_start;     // first row of each call in term_start
  Buffer hidden;                       // [N, padded I and a line], where blocks are cut
  Buffer outputs;                      // [N, D], where they are summed afterwards
  Buffer own;                          // see Worker in expert_ffn.cpp
};

// What RemoraExpertsFn does, of one layer.
int run_experts(const ExpertLayer& layer, ExpertScratch& scratch, const RemoraExpertCall* calls,
                int32_t num_calls);

}  // namespace remora
