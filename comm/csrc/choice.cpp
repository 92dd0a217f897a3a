#include "choice.h"

#include <algorithm>
#include <array>
#include <bit>

namespace remora {
namespace {

// Constants of `comm/choice.py`, under the same names there.
constexpr int64_t kUnit = 720720 * 64;
constexpr int64_t kOpenShard = kUnit / 8;
constexpr int64_t kGainOne = 16;
constexpr int64_t kLocalShare = 64;
constexpr int64_t kDecayShift = 13;

constexpr std::array<int64_t, kTopKMax + 1> shares(int64_t cost) {
  std::array<int64_t, kTopKMax + 1> share_N{};
  for (int n = 1; n <= kTopKMax; ++n) share_N[n] = cost / n;
  return share_N;
}
// A table: a processor that this was not built for may lack the instruction, and without it
// `std::popcount` is a call.
constexpr auto kBits = [] {
  std::array<uint8_t, 1 << 8> bits_M{};
  for (int m = 1; m < 1 << 8; ++m) bits_M[m] = static_cast<uint8_t>(bits_M[m >> 1] + (m & 1));
  return bits_M;
}();
int count(uint32_t pairs) { return kBits[pairs & 0xff] + kBits[pairs >> 8]; }  // of kTopKMax

constexpr auto kHostShare = shares(kUnit);
constexpr auto kShardShare = shares(kOpenShard);

int64_t forget(int64_t num_tokens) { return std::min<int64_t>(num_tokens, 1 << kDecayShift); }

// One function, not inlined arithmetic in two places: what is priced is what is kept.
int64_t decayed(int64_t load, int64_t num_tokens) {
  return load - ((load * forget(num_tokens)) >> kDecayShift);
}

}  // namespace

bool Chooser::choose(const Routing& routing, const ReplicaTable& table, const ShardTable& shards,
                     int32_t* shard_TK, int32_t* call_TK) {
  const int64_t num_pairs = routing.num_tokens * routing.top_k;
  if (table.num_replicas == 1) {  // nothing to choose
    for (int64_t p = 0; p < num_pairs; ++p) {
      const int64_t expert = routing.index_TK[p];
      call_TK[p] = expert < 0 ? kSkipped : 0;
      if (expert < 0) continue;
      if (expert >= table.num_experts) return false;
      const int16_t shard = table.shard_ER[expert];
      if (shard < 0 || !shards.usable_S[shard]) return false;
      shard_TK[p] = shard;
    }
    return true;
  }
  const int64_t num_shards = shards.num_shards;
  price_S_.resize(num_shards);
  int64_t total = 0;
  for (int64_t s = 0; s < num_shards; ++s) {
    price_S_[s] = decayed(table.load_S[s], routing.num_tokens);
    total += price_S_[s];
  }
  const int64_t slope =
      *shards.gain * kUnit * num_shards / (kGainOne * (total + kPrior * num_shards));
  const int64_t mean = total / num_shards;
  const int64_t local = *shards.gain * kUnit / (kGainOne * kLocalShare);
  for (int64_t s = 0; s < num_shards; ++s)
    price_S_[s] = (price_S_[s] - mean) * slope - (shards.host_S[s] == shards.own_host ? local : 0);
  pair_price_ = kPair * slope;
  cover_S_.assign(num_shards, 0);
  candidates_.resize(num_shards);
  left_.resize(num_shards);
  const int32_t num_hosts = 1 + *std::max_element(shards.host_S, shards.host_S + num_shards);
  cover_H_.assign(num_hosts, 0);
  opened_H_.assign(num_hosts, 0);
  for (int64_t t = 0; t < routing.num_tokens; ++t) {
    const int64_t first = t * routing.top_k;
    if (!token(routing.index_TK + first, routing.top_k, table, shards, shard_TK + first,
               call_TK + first))
      return false;
  }
  level_own_host(routing, table, shards, call_TK, shard_TK);
  return true;
}

void Chooser::settle(const Routing& routing, const ReplicaTable& table, const ShardTable& shards,
                     const int32_t* shard_TK, const int32_t* call_TK) const {
  if (table.num_replicas == 1) return;
  for (int64_t s = 0; s < shards.num_shards; ++s)
    table.load_S[s] = decayed(table.load_S[s], routing.num_tokens);
  for (int64_t p = 0; p < routing.num_tokens * routing.top_k; ++p) {
    if (call_TK[p] == kSkipped) continue;
    table.load_S[shard_TK[p]] += kPair;
    if (table.sent_S) ++table.sent_S[shard_TK[p]];
  }
}

bool Chooser::token(const int64_t* expert_K, int64_t top_k, const ReplicaTable& table,
                    const ShardTable& shards, int32_t* shard_K, int32_t* call_K) {
  num_candidates_ = num_opened_ = 0;
  uint32_t pairs = 0;
  for (int64_t k = 0; k < top_k; ++k) {
    const int64_t expert = expert_K[k];
    call_K[k] = expert < 0 ? kSkipped : 0;
    if (expert < 0) continue;
    if (expert >= table.num_experts) return false;
    bool covered = false;
    for (int64_t r = 0; r < table.num_replicas; ++r) {
      const int16_t s = table.shard_ER[expert * table.num_replicas + r];
      if (s < 0) break;
      if (!shards.usable_S[s]) continue;
      covered = true;
      if (cover_S_[s] == 0) candidates_[num_candidates_++] = s;
      cover_S_[s] |= 1u << k;
      cover_H_[shards.host_S[s]] |= 1u << k;
    }
    if (!covered) return false;
    pairs |= 1u << k;
  }
  std::copy_n(candidates_.begin(), num_candidates_, left_.begin());
  num_left_ = num_candidates_;
  for (uint32_t remaining = pairs; remaining;) {
    const int32_t s = best(shards, remaining);
    const uint32_t taken = cover_S_[s] & remaining;
    for (uint32_t bits = taken; bits; bits &= bits - 1) shard_K[std::countr_zero(bits)] = s;
    price_S_[s] += pair_price_ * count(taken);
    remaining &= ~taken;
    taken_[num_opened_] = taken;
    opened_[num_opened_++] = s;
    ++opened_H_[shards.host_S[s]];
  }
  if (num_opened_ > 1 && twice()) {
    close(shards, shard_K);
    level(twice(), shard_K);
  }
  for (int c = 0; c < num_candidates_; ++c) {
    const int32_t s = candidates_[c];
    cover_S_[s] = cover_H_[shards.host_S[s]] = 0;
    opened_H_[shards.host_S[s]] = 0;
  }
  return true;
}

int32_t Chooser::best(const ShardTable& shards, uint32_t remaining) {
  int32_t found = -1;
  int64_t least = 0;
  int num_left = 0;
  for (int c = 0; c < num_left_; ++c) {
    const int32_t s = left_[c];
    const uint32_t bits = cover_S_[s] & remaining;
    if (!bits) continue;  // nor later
    left_[num_left++] = s;
    const int32_t h = shards.host_S[s];
    int64_t score = price_S_[s] + kShardShare[count(bits)];
    if (h != shards.own_host && !opened_H_[h]) score += kHostShare[count(cover_H_[h] & remaining)];
    if (found < 0 || score < least || (score == least && s < found)) found = s, least = score;
  }
  num_left_ = num_left;
  return found;
}

// Pairs that two opened shards or more could take: all that `close` and `level` may change.
uint32_t Chooser::twice() const {
  uint32_t once = 0, again = 0;
  for (int i = 0; i < num_opened_; ++i) {
    if (opened_[i] < 0) continue;
    again |= once & cover_S_[opened_[i]];
    once |= cover_S_[opened_[i]];
  }
  return again;
}

int32_t Chooser::cheapest(int k, int32_t without) const {
  int32_t found = -1;
  for (int i = 0; i < num_opened_; ++i) {
    const int32_t s = opened_[i];
    if (s < 0 || s == without || !(cover_S_[s] >> k & 1)) continue;
    if (found < 0 || price_S_[s] < price_S_[found] ||
        (price_S_[s] == price_S_[found] && s < found))
      found = s;
  }
  return found;
}

void Chooser::move(int32_t from, int32_t to) {
  price_S_[to] += pair_price_;
  price_S_[from] -= pair_price_;
}

void Chooser::close(const ShardTable& shards, int32_t* shard_K) {
  uint32_t movable = twice();
  for (int i = 0; i < num_opened_; ++i) {
    const int32_t s = opened_[i];
    const int32_t h = shards.host_S[s];
    // Pairs come to an opened shard when another one is closed; none of its own leaves before.
    if (taken_[i] & ~movable) continue;
    int64_t saved = kOpenShard;
    if (h != shards.own_host && opened_H_[h] == 1) saved += kUnit;
    for (uint32_t bits = taken_[i]; bits; bits &= bits - 1)
      saved += price_S_[s] - price_S_[cheapest(std::countr_zero(bits), s)];
    if (saved <= 0) continue;
    for (uint32_t bits = taken_[i]; bits; bits &= bits - 1) {
      const int k = std::countr_zero(bits);
      const int32_t to = cheapest(k, s);
      shard_K[k] = to;
      move(s, to);
      for (int j = 0; j < num_opened_; ++j)
        if (opened_[j] == to) taken_[j] |= 1u << k;
    }
    opened_[i] = -1;
    --opened_H_[h];
    movable = twice();
  }
}

void Chooser::level(uint32_t pairs, int32_t* shard_K) {
  for (uint32_t bits = pairs; bits; bits &= bits - 1) {
    const int k = std::countr_zero(bits);
    const int32_t s = shard_K[k], other = cheapest(k, s);
    if (other >= 0 && price_S_[other] + pair_price_ < price_S_[s]) {
      shard_K[k] = other;
      move(s, other);
    }
  }
}

}  // namespace remora
