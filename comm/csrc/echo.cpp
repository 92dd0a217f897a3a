// A shard without weights: its answer is the rows it got. For `benchmarks/dataplane.py`.
#include "echo.h"

#include <cstring>

extern "C" int remora_echo(void* shard, int32_t, const struct RemoraExpertCall* calls,
                           int32_t num_calls) {
  const size_t row_bytes = reinterpret_cast<uintptr_t>(shard);  // the handle is a number
  for (const RemoraExpertCall* call = calls; call != calls + num_calls; ++call) {
    const char* rows = static_cast<const char*>(call->rows);
    char* out = static_cast<char*>(call->out);
    if (call->presummed) {
      std::memcpy(out, rows, static_cast<size_t>(call->num_rows) * row_bytes);
      continue;
    }
    for (int64_t p = 0; p < call->num_pairs; ++p)
      std::memcpy(out + static_cast<size_t>(p) * row_bytes,
                  rows + static_cast<size_t>(call->pair_row[p]) * row_bytes, row_bytes);
  }
  return REMORA_EXPERTS_DONE;
}
