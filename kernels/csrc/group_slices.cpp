// Sums and gathers in which each rank has a slice of the rows in an order that all ranks know:
// group_sum_slice (reduce-scatter) and group_gather_slices (all-gather). comm/slices.py has the twin.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "group_member.h"

namespace remora {
namespace {

// Rows in an order that all ranks know are divided among them: rank q has the q-th slice of it.
struct Slices {
  const int64_t* order;
  std::vector<int64_t> begin;  // of each rank in `order`, and the end of the last one
  int64_t row_bytes;
  uint64_t tag;

  Slices(const at::Tensor& order_T, int64_t num_rows, int64_t row_bytes_of, int64_t size)
      : order(order_T.const_data_ptr<int64_t>()), row_bytes(row_bytes_of) {
    const int64_t count = order_T.size(0);
    tag = 0xcbf29ce484222325ULL ^ static_cast<uint64_t>(row_bytes);
    for (int64_t i = 0; i < count; ++i) {
      TORCH_CHECK(order[i] >= 0 && order[i] < num_rows, "row ", order[i], " of ", num_rows);
      tag = (tag ^ static_cast<uint64_t>(order[i])) * 0x100000001b3ULL;  // FNV-1a
    }
    for (int64_t q = 0; q <= size; ++q) begin.push_back(first_of(q, count, size));
  }

  int64_t rows(int64_t q) const { return begin[q + 1] - begin[q]; }

  // Calls work(place among all rows, offset, count) for the bytes [first, first + count) of slice
  // q, in which its rows stand behind each other.
  template <class F>
  void each(int64_t q, int64_t first, int64_t count, F work) const {
    int64_t done = 0;
    while (done < count) {
      const int64_t row = (first + done) / row_bytes, column = (first + done) % row_bytes;
      const int64_t n = std::min(count - done, row_bytes - column);
      work(order[begin[q] + row] * row_bytes + column, done, n);
      done += n;
    }
  }
};

void check_order(const at::Tensor& rows, const at::Tensor& order) {
  TORCH_CHECK(rows.dim() == 2 && order.dim() == 1 && order.scalar_type() == at::kLong &&
                  order.is_contiguous(),
              "rows [T, D] and int64 order, got ", rows.sizes(), " and ", order.sizes());
}

// The sum over all ranks of the rows of this rank's slice, with the bits of `group_sum`.
template <class S>
void sum_slice_over(SharedGroup& group, const char* from, char* to, const Slices& slices) {
  const int size = group.size(), rank = group.rank();
  const int64_t step = static_cast<int64_t>(group.capacity()) / size / 64 * 64;
  TORCH_CHECK(step > 0, "a buffer of ", group.capacity(), " bytes for ", size, " ranks");
  const int64_t most = slices.rows(0) * slices.row_bytes;  // rank 0 has the longest slice
  const int64_t own = slices.rows(rank) * slices.row_bytes;
  std::vector<const char*> parts(size);
  for (int64_t first = 0; first < most; first += step) {
    char* buffer = group.begin();
    for (int q = 0; q < size; ++q) {
      const int64_t left = slices.rows(q) * slices.row_bytes - first;
      slices.each(q, first, std::clamp<int64_t>(left, 0, step),
                  [&](int64_t place, int64_t offset, int64_t n) {
                    std::memcpy(buffer + q * step + offset, from + place, n);
                  });
    }
    group.publish(slices.tag);
    for (int q = 0; q < size; ++q) {
      parts[q] = (q == rank ? buffer : group.part(q)) + rank * step;
    }
    const int64_t count = std::clamp<int64_t>(own - first, 0, step) / sizeof(S);
    sum_parts(parts, reinterpret_cast<S*>(to + first), count);
  }
}

at::Tensor group_sum_slice(const at::Tensor& part, const at::Tensor& order, int64_t number) {
  const auto member = member_of(number);
  check_order(part, order);
  TORCH_CHECK(part.scalar_type() == at::kFloat || part.scalar_type() == at::kBFloat16,
              "float32 or bfloat16 is summed, got ", part.scalar_type());
  const at::Tensor source = part.contiguous();
  const int64_t row_bytes = source.size(1) * source.element_size();
  const Slices slices(order, source.size(0), row_bytes, member->size);
  const int64_t own_rows = slices.rows(member->rank);
  if (member->dry) return at::zeros({own_rows, source.size(1)}, source.options());
  at::Tensor out = at::empty({own_rows, source.size(1)}, source.options());
  const char* from = static_cast<const char*>(source.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  note(*member, kSumSlice, (order.size(0) - own_rows) * row_bytes,
       own_rows * row_bytes * (member->size - 1));
  guarded([&] {
    if (part.scalar_type() == at::kFloat) {
      sum_slice_over<float>(*member->group, from, to, slices);
    } else {
      sum_slice_over<uint16_t>(*member->group, from, to, slices);
    }
  });
  return out;
}

// [num_rows, D]: row order[i] is row i of all slices behind each other, others are zeros.
at::Tensor group_gather_slices(const at::Tensor& rows, const at::Tensor& order, int64_t num_rows,
                               int64_t number) {
  const auto member = member_of(number);
  check_order(rows, order);
  const at::Tensor source = rows.contiguous();
  const int64_t width = source.size(1);
  const Slices slices(order, num_rows, width * source.element_size(), member->size);
  TORCH_CHECK(source.size(0) == slices.rows(member->rank), "rank ", member->rank, " has ",
              source.size(0), " rows, its slice is ", slices.rows(member->rank));
  if (member->dry) return at::zeros({num_rows, width}, source.options());
  at::Tensor out = order.size(0) == num_rows ? at::empty({num_rows, width}, source.options())
                                             : at::zeros({num_rows, width}, source.options());
  const char* mine = static_cast<const char*>(source.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t own = source.size(0) * slices.row_bytes;
  note(*member, kGatherSlices, own * (member->size - 1),
       order.size(0) * slices.row_bytes - own);
  guarded([&] {
    SharedGroup& group = *member->group;
    const int64_t step = static_cast<int64_t>(group.capacity());
    for (int64_t first = 0; first < slices.rows(0) * slices.row_bytes; first += step) {
      char* buffer = group.begin();
      const int64_t given = std::clamp<int64_t>(own - first, 0, step);
      if (given > 0) std::memcpy(buffer, mine + first, given);
      group.publish(~slices.tag);
      for (int q = 0; q < group.size(); ++q) {
        const int64_t left = slices.rows(q) * slices.row_bytes - first;
        const char* part = q == group.rank() ? mine + first : group.part(q);
        slices.each(q, first, std::clamp<int64_t>(left, 0, step),
                    [&](int64_t place, int64_t offset, int64_t n) {
                      std::memcpy(to + place, part + offset, n);
                    });
      }
    }
  });
  return out;
}

}  // namespace
}  // namespace remora

TORCH_LIBRARY_FRAGMENT(remora, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("group_sum_slice(Tensor part, Tensor order, int group) -> Tensor", tags);
  m.def("group_gather_slices(Tensor rows, Tensor order, int num_rows, int group) -> Tensor", tags);
}

TORCH_LIBRARY_IMPL(remora, CPU, m) {
  m.impl("group_sum_slice", &remora::group_sum_slice);
  m.impl("group_gather_slices", &remora::group_gather_slices);
}
