// Layout and packing of one layer: the C++ twin of `comm/plan.py`.
//
// Shape suffixes as there: T tokens, K top-k, E experts, R most replicas of one expert, S shards,
// C calls.
#pragma once

#include <cstdint>
#include <vector>

#include "choice.h"

namespace remora {

// Which call takes each pair, as its row and pair number what; memory is kept between layers.
struct Layout {
  std::vector<int32_t> shard_TK, call_TK, row_TK, pos_TK;
  std::vector<int32_t> call_shard_C, call_rows_C, call_pairs_C;
  std::vector<std::vector<int32_t>> token_CN;  // token of each row of each call
  int32_t num_calls = 0;

  // Room for the routing's pairs.
  void resize(const Routing& routing);
  // As `plan.lay_out` with first_call 0.
  void lay_out(const Routing& routing, int64_t num_experts, int64_t num_shards, int64_t rows_max);
  // The pair columns of every call, as `plan.pack`; `column_C[c]` is where they begin.
  void pack_pairs(const Routing& routing, const std::vector<char*>& column_C) const;
  // The rows of call `c` at `body`.
  void pack_rows(int32_t c, const char* hidden, uint64_t row_bytes, char* body) const;

 private:
  std::vector<int32_t> open_S_, last_token_S_, start_CE_;
};

// As `plan.combine`: sums the answers' rows into [out_rows, width] at `out`. `reply_C[c]` is where
// the rows of call `c` lie. Same bits as the numba twin: float32, in top-k order, one rounding.
void combine(const Layout& layout, const Routing& routing, int64_t width, bool is_bfloat16,
             bool presummed, const std::vector<const char*>& reply_C, char* out, int64_t out_rows);

}  // namespace remora
