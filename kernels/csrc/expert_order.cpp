// See expert_order.h.
#include "expert_order.h"

#include <algorithm>

#include "panel.h"

namespace remora {

int check_calls(const ExpertLayer& layer, const RemoraExpertCall* calls, int32_t num_calls) {
  for (int32_t c = 0; c < num_calls; ++c) {
    const RemoraExpertCall& call = calls[c];
    if (call.num_rows < 0 || call.num_pairs < 0) return REMORA_EXPERTS_BAD_CALL;
    for (int64_t p = 0; p < call.num_pairs; ++p) {
      if (call.pair_row[p] < 0 || call.pair_row[p] >= call.num_rows) return REMORA_EXPERTS_BAD_CALL;
      const int32_t expert = call.pair_expert[p];
      if (expert < 0 || expert >= layer.num_experts || layer.slot_of_expert[expert] < 0) {
        return REMORA_EXPERTS_NOT_HELD;
      }
    }
  }
  return REMORA_EXPERTS_DONE;
}

void sort_pairs(const ExpertLayer& layer, ExpertScratch& s, const RemoraExpertCall* calls,
                int32_t num_calls, int64_t num_pairs) {
  s.next.assign(layer.num_slots + 1, 0);
  for (int32_t c = 0; c < num_calls; ++c) {
    for (int64_t p = 0; p < calls[c].num_pairs; ++p) {
      ++s.next[layer.slot_of_expert[calls[c].pair_expert[p]] + 1];
    }
  }
  s.blocks.clear();
  for (int64_t slot = 0; slot < layer.num_slots; ++slot) {
    s.next[slot + 1] += s.next[slot];
    for (int64_t row = s.next[slot]; row < s.next[slot + 1]; row += kRowBlock) {
      s.blocks.push_back({slot, row, std::min(kRowBlock, s.next[slot + 1] - row)});
    }
  }
  s.place.resize(num_pairs);
  s.x_rows.resize(num_pairs);
  s.out_rows.resize(num_pairs);
  const int64_t row_bytes = layer.up.shape.num_inputs * layer.up.shape.element_size();
  int64_t pair = 0;
  for (int32_t c = 0; c < num_calls; ++c) {
    const RemoraExpertCall& call = calls[c];
    for (int64_t p = 0; p < call.num_pairs; ++p, ++pair) {
      const int64_t place = s.next[layer.slot_of_expert[call.pair_expert[p]]]++;
      s.place[pair] = place;
      s.x_rows[place] = static_cast<const char*>(call.rows) + call.pair_row[p] * row_bytes;
      s.out_rows[place] = call.presummed ? nullptr : static_cast<char*>(call.out) + p * row_bytes;
    }
  }
}

void sort_terms(ExpertScratch& s, const RemoraExpertCall* calls, int32_t num_calls) {
  s.call_start.assign(num_calls, 0);
  int64_t num_rows = 0;
  int64_t num_terms = 0;
  for (int32_t c = 0; c < num_calls; ++c) {
    s.call_start[c] = num_rows;
    if (!calls[c].presummed) continue;
    num_rows += calls[c].num_rows;
    num_terms += calls[c].num_pairs;
  }
  s.term_start.assign(num_rows + 2, 0);  // filled one place late: filling in moves it back
  s.term_place.resize(num_terms);
  s.term_weight.resize(num_terms);
  for (int32_t c = 0; c < num_calls; ++c) {
    if (!calls[c].presummed) continue;
    int64_t* count = s.term_start.data() + s.call_start[c] + 2;
    for (int64_t p = 0; p < calls[c].num_pairs; ++p) ++count[calls[c].pair_row[p]];
  }
  for (int64_t row = 1; row < num_rows + 2; ++row) s.term_start[row] += s.term_start[row - 1];
  int64_t pair = 0;
  for (int32_t c = 0; c < num_calls; ++c) {
    int64_t* start = s.term_start.data() + s.call_start[c] + 1;
    for (int64_t p = 0; p < calls[c].num_pairs; ++p, ++pair) {
      if (!calls[c].presummed) continue;
      const int64_t j = start[calls[c].pair_row[p]]++;
      s.term_place[j] = s.place[pair];
      s.term_weight[j] = calls[c].pair_weight[p];
    }
  }
}

}  // namespace remora
