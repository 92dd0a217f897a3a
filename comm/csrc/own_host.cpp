// Experts of our own host, levelled: the C++ twin of `comm/own_host.py`, which says why.
#include <algorithm>

#include "choice.h"

namespace remora {
namespace {

// Constants of `comm/own_host.py`, under the same names there.
constexpr int32_t kReadRows = 32;
constexpr int32_t kSplitRows = 128;
constexpr int64_t kUneven = 4;

}  // namespace

void Chooser::level_own_host(const Routing& routing, const ReplicaTable& table,
                             const ShardTable& shards, const int32_t* call_TK, int32_t* shard_TK) {
  const auto own = [&](int32_t s) {
    return shards.host_S[s] == shards.own_host && shards.usable_S[s];
  };
  int num_own = 0;
  int64_t least = 0, most = 0, total = 0;
  for (int32_t s = 0; s < shards.num_shards; ++s) {
    if (!own(s)) continue;
    const int64_t load = table.load_S[s];
    least = num_own == 0 ? load : std::min(least, load);
    most = std::max(most, load);
    total += load;
    ++num_own;
  }
  if (num_own < 2 || kUneven * (most - least) > total / num_own + kPrior) return;
  const int64_t num_pairs = routing.num_tokens * routing.top_k;
  const auto here = [&](int64_t p) {
    return call_TK[p] != kSkipped && shards.host_S[shard_TK[p]] == shards.own_host;
  };
  rows_E_.resize(table.num_experts);  // zero between two calls
  given_E_.resize(table.num_experts);
  cost_S_.assign(shards.num_shards, 0);
  hit_.clear();
  movable_.clear();
  for (int64_t p = 0; p < num_pairs; ++p)
    if (here(p) && rows_E_[routing.index_TK[p]]++ == 0)
      hit_.push_back(static_cast<int32_t>(routing.index_TK[p]));
  for (const int32_t e : hit_) {
    given_E_[e] = -1;
    if (rows_E_[e] > kSplitRows) continue;
    int holders = 0;
    for (int64_t r = 0; r < table.num_replicas; ++r) {
      const int16_t s = table.shard_ER[e * table.num_replicas + r];
      if (s < 0) break;
      if (own(s)) ++holders, given_E_[e] = s;
    }
    if (holders == 1)
      cost_S_[given_E_[e]] += kReadRows + rows_E_[e];
    else
      movable_.push_back(e);
  }
  if (!movable_.empty()) {
    for (int64_t p = 0; p < num_pairs; ++p)
      if (here(p)) cost_S_[shard_TK[p]] += rows_E_[routing.index_TK[p]] > kSplitRows;
    std::sort(movable_.begin(), movable_.end(), [&](int32_t a, int32_t b) {
      return rows_E_[a] != rows_E_[b] ? rows_E_[a] > rows_E_[b] : a < b;
    });
    for (const int32_t e : movable_) {
      int32_t best = -1;
      for (int64_t r = 0; r < table.num_replicas; ++r) {
        const int16_t s = table.shard_ER[e * table.num_replicas + r];
        if (s < 0) break;
        if (!own(s)) continue;
        if (best < 0 || cost_S_[s] < cost_S_[best] || (cost_S_[s] == cost_S_[best] && s < best))
          best = s;
      }
      cost_S_[best] += kReadRows + rows_E_[e];
      given_E_[e] = best;
    }
    for (int64_t p = 0; p < num_pairs; ++p)
      if (here(p) && given_E_[routing.index_TK[p]] >= 0) shard_TK[p] = given_E_[routing.index_TK[p]];
  }
  for (const int32_t e : hit_) rows_E_[e] = 0;
}

}  // namespace remora
