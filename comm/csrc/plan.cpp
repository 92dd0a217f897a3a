#include "plan.h"

#include <cstring>

namespace remora {

void Layout::resize(const Routing& routing) {
  const int64_t num_pairs = routing.num_tokens * routing.top_k;
  for (std::vector<int32_t>* column : {&shard_TK, &call_TK, &row_TK, &pos_TK})
    column->resize(num_pairs);
}

void Layout::lay_out(const Routing& routing, int64_t num_experts, int64_t num_shards,
                     int64_t rows_max) {
  open_S_.assign(num_shards, -1);
  last_token_S_.assign(num_shards, -1);
  call_shard_C.clear();
  call_rows_C.clear();
  call_pairs_C.clear();
  num_calls = 0;
  for (int64_t t = 0; t < routing.num_tokens; ++t) {
    for (int64_t k = 0; k < routing.top_k; ++k) {
      const int64_t p = t * routing.top_k + k;
      if (call_TK[p] < 0) continue;
      const int32_t s = shard_TK[p];
      int32_t c = open_S_[s];
      if (last_token_S_[s] != t) {  // the token's row is not in a call to this shard yet
        last_token_S_[s] = static_cast<int32_t>(t);
        if (c < 0 || call_rows_C[c] >= rows_max) {
          c = open_S_[s] = num_calls++;
          call_shard_C.push_back(s);
          call_rows_C.push_back(0);
          call_pairs_C.push_back(0);
          if (static_cast<size_t>(num_calls) > token_CN.size()) token_CN.emplace_back();
          token_CN[c].clear();
        }
        token_CN[c].push_back(static_cast<int32_t>(t));
        ++call_rows_C[c];
      }
      call_TK[p] = c;
      row_TK[p] = call_rows_C[c] - 1;
      ++call_pairs_C[c];
    }
  }
  // counting sort of each call's pairs by expert; tokens in order keep rows in order
  const int64_t stride = num_experts + 1;
  start_CE_.assign(num_calls * stride, 0);
  const int64_t num_pairs = routing.num_tokens * routing.top_k;
  for (int64_t p = 0; p < num_pairs; ++p)
    if (call_TK[p] >= 0) ++start_CE_[call_TK[p] * stride + routing.index_TK[p] + 1];
  for (int64_t c = 0; c < num_calls; ++c)
    for (int64_t e = 0; e < num_experts; ++e)
      start_CE_[c * stride + e + 1] += start_CE_[c * stride + e];
  for (int64_t p = 0; p < num_pairs; ++p)
    if (call_TK[p] >= 0) pos_TK[p] = start_CE_[call_TK[p] * stride + routing.index_TK[p]]++;
}

void Layout::pack_pairs(const Routing& routing, const std::vector<char*>& column_C) const {
  const int64_t num_pairs = routing.num_tokens * routing.top_k;
  for (int64_t p = 0; p < num_pairs; ++p) {
    const int32_t c = call_TK[p];
    if (c < 0) continue;
    const int64_t count = call_pairs_C[c];
    char* at = column_C[c] + 4 * int64_t{pos_TK[p]};
    const auto expert = static_cast<int32_t>(routing.index_TK[p]);
    std::memcpy(at, &row_TK[p], 4);
    std::memcpy(at + 4 * count, &expert, 4);
    std::memcpy(at + 8 * count, &routing.weight_TK[p], 4);
  }
}

void Layout::pack_rows(int32_t c, const char* hidden, uint64_t row_bytes, char* body) const {
  const std::vector<int32_t>& token_N = token_CN[c];
  for (size_t first = 0; first < token_N.size();) {  // neighbours leave together
    size_t end = first + 1;
    while (end < token_N.size() && token_N[end] == token_N[end - 1] + 1) ++end;
    std::memcpy(body + first * row_bytes, hidden + token_N[first] * row_bytes,
                (end - first) * row_bytes);
    first = end;
  }
}

}  // namespace remora
