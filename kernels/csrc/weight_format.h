// What an op is told about the weights that it is given.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "packed_shape.h"

namespace remora {

// Weights as they are have the dtype of the rows; quantised ones are bytes, under bfloat16 rows.
inline WeightFormat weight_format(at::ScalarType rows, const std::optional<std::string_view>& quantized) {
  TORCH_CHECK(rows == at::kBFloat16 || (rows == at::kFloat && !quantized.has_value()),
              "rows must be bfloat16, or float32 where weights are not quantised, got ", rows);
  if (!quantized.has_value()) return rows == at::kBFloat16 ? WeightFormat::kBFloat16 : WeightFormat::kFloat32;
  TORCH_CHECK(*quantized == "int8" || *quantized == "int4", "weights are quantised to int8 or int4, not to ",
              *quantized);
  return *quantized == "int8" ? WeightFormat::kInt8 : WeightFormat::kInt4;
}

inline at::ScalarType stored_type(WeightFormat format) {
  switch (format) {
    case WeightFormat::kFloat32: return at::kFloat;
    case WeightFormat::kBFloat16: return at::kBFloat16;
    default: return at::kByte;
  }
}

// Whether `packed` holds `num_slots` weights of this shape.
inline bool fits(const at::Tensor& packed, const PackedShape& shape, int64_t num_slots) {
  return packed.scalar_type() == stored_type(shape.format) && packed.is_contiguous() &&
         static_cast<int64_t>(packed.nbytes()) == num_slots * shape.packed_nbytes();
}

inline const char* byte_pointer(const at::Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); }

inline void check_bias(const std::optional<at::Tensor>& bias, const at::Tensor& x, int64_t numel) {
  if (!bias.has_value()) return;
  TORCH_CHECK(bias->scalar_type() == x.scalar_type() && bias->is_contiguous() &&
                  bias->numel() == numel,
              "bias must be contiguous, ", x.scalar_type(), " and of ", numel, " elements, got ",
              bias->scalar_type(), " ", bias->sizes());
}

}  // namespace remora
