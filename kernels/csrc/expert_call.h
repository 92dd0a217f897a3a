/* How a socket loop asks a shard's kernel, without torch and without Python in between: plain C.
 *
 * `torch.ops.remora.expert_entry()` is the address of a RemoraExpertsFn, and the handle of a
 * `remora.kernels.expert_shard.NativeShard` is the shard it takes. One thread calls. */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Rows and the (row, expert, weight) pairs behind them, of one requester. */
struct RemoraExpertCall {
  const void* rows;           /* [num_rows, D] contiguous, in the shard's dtype */
  int64_t num_rows;
  const int32_t* pair_row;    /* [num_pairs], 0 <= row < num_rows */
  const int32_t* pair_expert; /* [num_pairs], logical experts */
  const float* pair_weight;   /* [num_pairs]; read where presummed */
  int64_t num_pairs;
  void* out; /* presummed: [num_rows, D], weighted sums; else [num_pairs, D], not weighted */
  int32_t presummed;
};

/* All calls are of one layer and are computed together. Returns 0; or, with nothing written, a number
 * that says "not for me": the caller asks the Python path then. */
typedef int (*RemoraExpertsFn)(void* shard, int32_t layer, const struct RemoraExpertCall* calls,
                               int32_t num_calls);

enum {
  REMORA_EXPERTS_DONE = 0,
  REMORA_EXPERTS_UNKNOWN_LAYER = 1, /* none of this layer here, or one that only Python computes */
  REMORA_EXPERTS_NOT_HELD = 2,      /* an expert that this shard does not hold */
  REMORA_EXPERTS_BAD_CALL = 3,      /* a row out of range, a negative count */
  REMORA_EXPERTS_NO_MEMORY = 4
};

#ifdef __cplusplus
}
#endif
