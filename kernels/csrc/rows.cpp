// See rows.h.
#include "rows.h"

#include "scalar.h"

namespace remora {

REMORA_CLONES void add_row(float* sum, const float* row, float weight, int64_t count) {
  for (int64_t i = 0; i < count; ++i) sum[i] += weight * row[i];
}
REMORA_CLONES void add_row(float* sum, const uint16_t* row, float weight, int64_t count) {
  for (int64_t i = 0; i < count; ++i) sum[i] += weight * widen(row[i]);
}
REMORA_CLONES void round_row(const float* sum, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) narrow(sum[i], out + i);
}
REMORA_CLONES void round_row(const float* sum, uint16_t* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) narrow(sum[i], out + i);
}

}  // namespace remora
