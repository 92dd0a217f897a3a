// Replica choice: the C++ twin of `comm/choice.py`, which says what is chosen and why.
//
// Shape suffixes as there: T tokens, K top-k, E experts, R most replicas, S shards, H hosts.
#pragma once

#include <cstdint>
#include <vector>

namespace remora {

constexpr int kTopKMax = 16;
constexpr int64_t kPair = 64;
constexpr int64_t kPrior = 256 * kPair;
constexpr int32_t kSkipped = -2;  // plan.SKIPPED: a pair whose expert is negative

// Shards that hold each expert of one decoder layer, padded with -1 (`replicas.replica_tables`),
// and the layer's load, recent and own (`routes.Routes`).
struct ReplicaTable {
  const int16_t* shard_ER = nullptr;
  int64_t num_experts = 0;
  int64_t num_replicas = 0;
  int64_t* load_S = nullptr;
  int64_t* sent_S = nullptr;  // pairs of our own, ever; null: nobody counts them
};

// What of the shards the choice depends on.
struct ShardTable {
  const int32_t* host_S = nullptr;
  const uint8_t* usable_S = nullptr;
  const int64_t* gain = nullptr;  // of the load prices, in 1 / kGainOne; changes while we run
  int64_t num_shards = 0;
  int32_t own_host = -1;
};

// Routing of one layer as it came; contiguous.
struct Routing {
  const int64_t* index_TK;
  const float* weight_TK;
  int64_t num_tokens;
  int64_t top_k;
};

class Chooser {
 public:
  // As `choice.choose` on pairs that are all PENDING, load untouched; false when an expert has no
  // usable replica. Writes shards, and kSkipped or 0 for the calls.
  bool choose(const Routing& routing, const ReplicaTable& table, const ShardTable& shards,
              int32_t* shard_TK, int32_t* call_TK);
  // As `choice.settle`: the pairs chosen last count as load from now on.
  void settle(const Routing& routing, const ReplicaTable& table, const ShardTable& shards,
              const int32_t* shard_TK, const int32_t* call_TK) const;

 private:
  bool token(const int64_t* expert_K, int64_t top_k, const ReplicaTable& table,
             const ShardTable& shards, int32_t* shard_K, int32_t* call_K);
  int32_t best(const ShardTable& shards, uint32_t remaining);
  int32_t cheapest(int k, int32_t without) const;
  uint32_t twice() const;
  void close(const ShardTable& shards, int32_t* shard_K);
  void level(uint32_t pairs, int32_t* shard_K);
  void move(int32_t from, int32_t to);
  void level_own_host(const Routing& routing, const ReplicaTable& table, const ShardTable& shards,
                      const int32_t* call_TK, int32_t* shard_TK);

  std::vector<int64_t> price_S_;
  std::vector<uint32_t> cover_S_, cover_H_;
  std::vector<int32_t> opened_H_, candidates_, left_;  // left_: those that cover what remains
  int32_t opened_[kTopKMax];
  uint32_t taken_[kTopKMax];  // pairs that each opened shard was opened for
  int num_candidates_ = 0, num_left_ = 0, num_opened_ = 0;
  int64_t pair_price_ = 0;
  std::vector<int32_t> rows_E_, given_E_, movable_, hit_;
  std::vector<int64_t> cost_S_;
};

}  // namespace remora
