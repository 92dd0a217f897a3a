// Weighted sums of rows: float32 inside, product and sum rounded separately, rounded once at the end.
#pragma once

#include <cstdint>

namespace remora {

// sum[i] += weight * row[i]
void add_row(float* sum, const float* row, float weight, int64_t count);
void add_row(float* sum, const uint16_t* row, float weight, int64_t count);

void round_row(const float* sum, float* out, int64_t count);
void round_row(const float* sum, uint16_t* out, int64_t count);

}  // namespace remora
