// The operator `remora::attend` (attention.cpp), for other operators.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <optional>

namespace remora_attention {

at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::Tensor k_pages,
                  at::Tensor v_pages, const at::Tensor& plan, double scale, int64_t window,
                  int64_t chunk, double soft_cap, std::optional<at::Tensor> sinks, int64_t isa_max);

}  // namespace remora_attention
