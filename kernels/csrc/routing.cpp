// Rows to slots and back: route_sort, gather_rows, combine_ordered, presum. Sums are float32,
// multiply and add rounded separately, in the order of the terms: the same bits on every
// instruction set.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "phase.h"
#include "rows.h"
#include "team.h"

namespace remora {
namespace {

constexpr int64_t kGrainElements = 1 << 16;  // of work for one thread

at::Tensor unit_rows(const at::Tensor& rows) {
  TORCH_CHECK(rows.dim() == 2 &&
                  (rows.scalar_type() == at::kBFloat16 || rows.scalar_type() == at::kFloat),
              "rows must be [N, D], bfloat16 or float32, got ", rows.sizes(), " ",
              rows.scalar_type());
  return rows.size(1) <= 1 || rows.stride(1) == 1 ? rows : rows.contiguous();
}

// A contiguous int64 copy or view, every element in -1..limit-1.
at::Tensor checked_index(const at::Tensor& index, int64_t limit, const char* name) {
  TORCH_CHECK(index.scalar_type() == at::kLong, name, " must be int64, got ", index.scalar_type());
  const at::Tensor result = index.contiguous();
  const int64_t* values = result.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < result.numel(); ++i) {
    TORCH_CHECK_INDEX(values[i] >= -1 && values[i] < limit, name, " must be in -1..", limit - 1,
                      ", got ", values[i]);
  }
  return result;
}

int64_t rows_per_grain(int64_t elements_per_row) {
  return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, elements_per_row));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> route_sort(const at::Tensor& slots,
                                                          int64_t num_slots) {
  const PhaseTimer timer(Phase::kRouting);
  TORCH_CHECK(slots.dim() == 1, "slots must be [N], got ", slots.sizes());
  const at::Tensor usable = checked_index(slots, num_slots, "slots");
  const int64_t num_pairs = usable.numel();
  const int64_t* slot = usable.const_data_ptr<int64_t>();
  at::Tensor order = at::empty({num_pairs}, usable.options());
  at::Tensor place = at::empty({num_pairs}, usable.options());
  at::Tensor offsets = at::empty({num_slots + 1}, usable.options());
  std::vector<int64_t> next(num_slots + 2, 0);  // one bucket more, for the pairs of no slot
  for (int64_t i = 0; i < num_pairs; ++i) ++next[(slot[i] < 0 ? num_slots : slot[i]) + 1];
  for (int64_t s = 0; s <= num_slots; ++s) next[s + 1] += next[s];
  std::copy_n(next.begin(), num_slots + 1, offsets.mutable_data_ptr<int64_t>());
  int64_t* order_data = order.mutable_data_ptr<int64_t>();
  int64_t* place_data = place.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < num_pairs; ++i) {
    const int64_t target = next[slot[i] < 0 ? num_slots : slot[i]]++;
    order_data[target] = i;
    place_data[i] = target;
  }
  return {order, place, offsets};
}

at::Tensor gather_rows(const at::Tensor& rows, const at::Tensor& index) {
  const PhaseTimer timer(Phase::kRouting);
  const at::Tensor source = unit_rows(rows);
  TORCH_CHECK(index.dim() == 1, "index must be [N], got ", index.sizes());
  const at::Tensor usable = checked_index(index, source.size(0), "index");
  const int64_t width = source.size(1);
  const int64_t bytes = width * source.element_size();
  const int64_t stride = source.stride(0) * source.element_size();
  at::Tensor out = at::empty({usable.numel(), width}, source.options());
  const char* from = static_cast<const char*>(source.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t* row = usable.const_data_ptr<int64_t>();
  team_for(usable.numel(), rows_per_grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (row[i] < 0) {
        std::memset(to + i * bytes, 0, bytes);
      } else {
        std::memcpy(to + i * bytes, from + row[i] * stride, bytes);
      }
    }
  });
  return out;
}

// out[t] = sum of weights[j] * rows[index[j]] for j in starts[t]..starts[t + 1], in order.
template <class S>
void weighted_sums(const at::Tensor& rows, const int64_t* index, const float* weights,
                   const int64_t* starts, at::Tensor& out) {
  const int64_t width = rows.size(1);
  const int64_t num_terms = starts[out.size(0)];
  const S* from = static_cast<const S*>(rows.const_data_ptr());
  S* to = static_cast<S*>(out.mutable_data_ptr());
  const int64_t per_row = num_terms * width / std::max<int64_t>(1, out.size(0));
  team_for(out.size(0), rows_per_grain(per_row), [&](int64_t begin, int64_t end) {
    std::vector<float> sum(width);
    for (int64_t t = begin; t < end; ++t) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int64_t j = starts[t]; j < starts[t + 1]; ++j) {
        if (index[j] >= 0) add_row(sum.data(), from + index[j] * rows.stride(0), weights[j], width);
      }
      round_row(sum.data(), to + t * width, width);
    }
  });
}

at::Tensor sums_of(const at::Tensor& rows, const int64_t* index, const float* weights,
                   const std::vector<int64_t>& starts) {
  at::Tensor out =
      at::empty({static_cast<int64_t>(starts.size()) - 1, rows.size(1)}, rows.options());
  if (rows.scalar_type() == at::kBFloat16) {
    weighted_sums<uint16_t>(rows, index, weights, starts.data(), out);
  } else {
    weighted_sums<float>(rows, index, weights, starts.data(), out);
  }
  return out;
}

at::Tensor combine_ordered(const at::Tensor& rows, const at::Tensor& index,
                           const at::Tensor& weights) {
  const PhaseTimer timer(Phase::kRouting);
  TORCH_CHECK(index.dim() == 2 && weights.sizes() == index.sizes(), "index ", index.sizes(),
              " and weights ", weights.sizes(), " must both be [T, K]");
  const at::Tensor source = unit_rows(rows);
  const at::Tensor usable = checked_index(index, source.size(0), "index");
  const at::Tensor factors = weights.to(at::kFloat).contiguous();
  std::vector<int64_t> starts(index.size(0) + 1);
  for (int64_t t = 0; t <= index.size(0); ++t) starts[t] = t * index.size(1);
  return sums_of(source, usable.const_data_ptr<int64_t>(), factors.const_data_ptr<float>(), starts);
}

at::Tensor presum(const at::Tensor& rows, const at::Tensor& pair_row, const at::Tensor& pair_weight,
                  int64_t num_rows, const std::optional<at::Tensor>& place) {
  const PhaseTimer timer(Phase::kRouting);
  const at::Tensor source = unit_rows(rows);
  TORCH_CHECK(pair_row.dim() == 1 && pair_weight.sizes() == pair_row.sizes() &&
                  (!place.has_value() || place->sizes() == pair_row.sizes()),
              "pair_row ", pair_row.sizes(), ", pair_weight and place must all be [N]");
  const at::Tensor target = checked_index(pair_row, num_rows, "pair_row");
  const int64_t num_pairs = target.numel();
  TORCH_CHECK_INDEX(place.has_value() || num_pairs <= source.size(0), num_pairs, " pairs of ",
                    source.size(0), " rows");
  const at::Tensor places =
      place.has_value() ? checked_index(*place, source.size(0), "place") : at::Tensor();
  const at::Tensor factors = pair_weight.to(at::kFloat).contiguous();
  const int64_t* row = target.const_data_ptr<int64_t>();
  std::vector<int64_t> starts(num_rows + 1, 0);
  for (int64_t p = 0; p < num_pairs; ++p) {
    if (row[p] >= 0) ++starts[row[p] + 1];
  }
  for (int64_t t = 0; t < num_rows; ++t) starts[t + 1] += starts[t];
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  std::vector<int64_t> index(starts.back());
  std::vector<float> weights(starts.back());
  for (int64_t p = 0; p < num_pairs; ++p) {
    if (row[p] < 0) continue;
    const int64_t j = next[row[p]]++;
    index[j] = place.has_value() ? places.const_data_ptr<int64_t>()[p] : p;
    weights[j] = factors.const_data_ptr<float>()[p];
  }
  return sums_of(source, index.data(), weights.data(), starts);
}

}  // namespace
}  // namespace remora

TORCH_LIBRARY_FRAGMENT(remora, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("route_sort(Tensor slots, int num_slots) -> (Tensor, Tensor, Tensor)", tags);
  m.def("gather_rows(Tensor rows, Tensor index) -> Tensor", tags);
  m.def("combine_ordered(Tensor rows, Tensor index, Tensor weights) -> Tensor", tags);
  m.def("presum(Tensor rows, Tensor pair_row, Tensor pair_weight, int num_rows, Tensor? place)"
        " -> Tensor", tags);
}

TORCH_LIBRARY_IMPL(remora, CPU, m) {
  m.impl("route_sort", &remora::route_sort);
  m.impl("gather_rows", &remora::gather_rows);
  m.impl("combine_ordered", &remora::combine_ordered);
  m.impl("presum", &remora::presum);
}
