// Sums and gathers over a tensor-parallel group through shared memory (shared_group.h): group_open,
// group_close, group_sum, group_gather_rows, group_gather_columns and what steers and counts them.
// Slices in an order that changes are in group_slices.cpp.
//
// A sum is taken in float32 in the order of the ranks and rounded once, so it is the same on every
// rank and depends on nothing but the ranks' values. Rows and columns are divided as evenly as can
// be: rank r has [ceil(r * n / size), ceil((r + 1) * n / size)).
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "group_member.h"
#include "rows.h"
#include "scalar.h"

namespace remora {
namespace {

constexpr int64_t kBlock = 1024;  // elements summed at a time: their float32 sums stay in L1

std::mutex registry_mutex;
std::map<int64_t, std::shared_ptr<Member>> registry;

}  // namespace

std::shared_ptr<Member> member_of(int64_t number) {
  const std::lock_guard<std::mutex> lock(registry_mutex);
  const auto found = registry.find(number);
  TORCH_CHECK(found != registry.end(), "tensor-parallel group ", number, " is not open");
  return found->second;
}

namespace {

void group_open(int64_t number, int64_t address, int64_t rank, int64_t size, int64_t capacity,
                int64_t spin_us, int64_t deadline_ms, at::IntArrayRef peer_sockets,
                at::IntArrayRef peer_ranks) {
  TORCH_CHECK(size >= 1 && size <= kRanksMax && rank >= 0 && rank < size, "rank ", rank, " of ",
              size, ": allowed are 1 to ", kRanksMax, " ranks");
  TORCH_CHECK(capacity >= 64 && capacity % 64 == 0, "capacity ", capacity, " is no multiple of 64");
  TORCH_CHECK(peer_sockets.size() == peer_ranks.size(), "one rank for each socket");
  auto member = std::make_shared<Member>();
  member->rank = static_cast<int>(rank);
  member->size = static_cast<int>(size);
  member->dry = address == 0;
  if (address != 0) {
    member->group = std::make_unique<SharedGroup>(
        reinterpret_cast<char*>(address), member->rank, member->size, capacity, spin_us,
        deadline_ms, std::vector<int>(peer_sockets.begin(), peer_sockets.end()),
        std::vector<int>(peer_ranks.begin(), peer_ranks.end()));
  }
  const std::lock_guard<std::mutex> lock(registry_mutex);
  TORCH_CHECK(registry.emplace(number, std::move(member)).second, "group ", number, " is open");
}

void group_close(int64_t number) {
  const std::lock_guard<std::mutex> lock(registry_mutex);
  registry.erase(number);
}

// Calls, bytes sent and bytes received of each operation.
std::vector<int64_t> group_counters(int64_t number) {
  const auto member = member_of(number);
  std::vector<int64_t> all;
  for (const Count& count : member->counts) {
    all.insert(all.end(), {count.calls.load(), count.sent.load(), count.received.load()});
  }
  return all;
}

// Turns imagination on and off (`dry`): warm-up steps run on one rank alone.
void group_set_dry(int64_t number, bool dry) {
  const auto member = member_of(number);
  TORCH_CHECK(member->group != nullptr || dry, "group ", number, " has no memory");
  member->dry = dry;
}

SharedGroup& shared(const std::shared_ptr<Member>& member) {
  TORCH_CHECK(member->group != nullptr, "a group without memory");
  return *member->group;
}

void group_abort(int64_t number, const std::string& text) { shared(member_of(number)).abort(text); }
std::string group_abort_text(int64_t number) { return shared(member_of(number)).abort_text(); }
void group_reset(int64_t number, int64_t sequence) {
  shared(member_of(number)).reset(static_cast<uint32_t>(sequence));
}
void group_set_sequence(int64_t number, int64_t sequence) {
  shared(member_of(number)).set_sequence(static_cast<uint32_t>(sequence));
}
int64_t group_sequence(int64_t number) { return shared(member_of(number)).sequence(); }
int64_t group_bytes(int64_t size, int64_t capacity) {
  return static_cast<int64_t>(SharedGroup::bytes_needed(static_cast<int>(size), capacity));
}

REMORA_CLONES void take(const float* from, float* sum, int64_t count) {
  for (int64_t i = 0; i < count; ++i) sum[i] = widen(from[i]);
}
REMORA_CLONES void take(const uint16_t* from, float* sum, int64_t count) {
  for (int64_t i = 0; i < count; ++i) sum[i] = widen(from[i]);
}
REMORA_CLONES void add(const float* from, float* sum, int64_t count) {
  for (int64_t i = 0; i < count; ++i) sum[i] += widen(from[i]);
}
REMORA_CLONES void add(const uint16_t* from, float* sum, int64_t count) {
  for (int64_t i = 0; i < count; ++i) sum[i] += widen(from[i]);
}

template <class S>
void sum_rows(const std::vector<const char*>& parts, S* out, int64_t count) {
  float sum[kBlock];
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t n = std::min(kBlock, count - first);
    take(reinterpret_cast<const S*>(parts[0]) + first, sum, n);
    for (size_t q = 1; q < parts.size(); ++q) {
      add(reinterpret_cast<const S*>(parts[q]) + first, sum, n);
    }
    round_row(sum, out + first, n);
  }
}

}  // namespace

void sum_parts(const std::vector<const char*>& parts, float* out, int64_t count) {
  sum_rows(parts, out, count);
}
void sum_parts(const std::vector<const char*>& parts, uint16_t* out, int64_t count) {
  sum_rows(parts, out, count);
}

namespace {

template <class S>
void sum_over(SharedGroup& group, const char* from, char* to, int64_t count) {
  const int64_t step = static_cast<int64_t>(group.capacity() / sizeof(S));
  std::vector<const char*> parts(group.size());
  for (int64_t first = 0; first < count; first += step) {
    const int64_t n = std::min(step, count - first);
    const char* mine = from + first * static_cast<int64_t>(sizeof(S));
    std::memcpy(group.begin(), mine, n * sizeof(S));
    group.publish();
    for (int q = 0; q < group.size(); ++q) parts[q] = q == group.rank() ? mine : group.part(q);
    sum_parts(parts, reinterpret_cast<S*>(to) + first, n);
  }
}

at::Tensor group_sum(const at::Tensor& part, int64_t number) {
  const auto member = member_of(number);
  TORCH_CHECK(part.scalar_type() == at::kFloat || part.scalar_type() == at::kBFloat16,
              "float32 or bfloat16 is summed, got ", part.scalar_type());
  const at::Tensor source = part.contiguous();
  at::Tensor out = at::empty_like(source);
  if (member->dry) return out.copy_(source);
  const char* from = static_cast<const char*>(source.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t to_others = static_cast<int64_t>(source.nbytes()) * (member->size - 1);
  note(*member, kSum, to_others, to_others);
  guarded([&] {
    if (part.scalar_type() == at::kFloat) {
      sum_over<float>(*member->group, from, to, source.numel());
    } else {
      sum_over<uint16_t>(*member->group, from, to, source.numel());
    }
  });
  return out;
}

// Hands `bytes[q]` bytes of each rank q to whoever receives: sink(q, offset, pointer, count).
template <class F>
void exchange(SharedGroup& group, const char* mine, const std::vector<int64_t>& bytes, bool receive,
              F sink) {
  const int64_t step = static_cast<int64_t>(group.capacity());
  const int64_t most = *std::max_element(bytes.begin(), bytes.end());
  for (int64_t first = 0; first < most; first += step) {
    char* buffer = group.begin();
    const int64_t own = std::clamp<int64_t>(bytes[group.rank()] - first, 0, step);
    if (own > 0) std::memcpy(buffer, mine + first, own);
    group.publish();
    if (!receive) continue;
    for (int q = 0; q < group.size(); ++q) {
      const int64_t count = std::clamp<int64_t>(bytes[q] - first, 0, step);
      if (count > 0) sink(q, first, q == group.rank() ? mine + first : group.part(q), count);
    }
  }
}

at::Tensor group_gather_rows(const at::Tensor& rows, int64_t num_rows, int64_t number) {
  const auto member = member_of(number);
  const int64_t size = member->size;
  const int64_t begin = first_of(member->rank, num_rows, size);
  TORCH_CHECK(rows.dim() == 2 && rows.size(0) == first_of(member->rank + 1, num_rows, size) - begin,
              "rank ", member->rank, " of ", size, " has ", rows.sizes(), " of ", num_rows, " rows");
  const at::Tensor source = rows.contiguous();
  const int64_t row_bytes = source.size(1) * source.element_size();
  if (member->dry) return at::zeros({num_rows, source.size(1)}, source.options());
  at::Tensor out = at::empty({num_rows, source.size(1)}, source.options());
  std::vector<int64_t> bytes(size);
  for (int64_t q = 0; q < size; ++q) {
    bytes[q] = (first_of(q + 1, num_rows, size) - first_of(q, num_rows, size)) * row_bytes;
  }
  char* to = static_cast<char*>(out.mutable_data_ptr());
  note(*member, kGatherRows, bytes[member->rank] * (size - 1),
       num_rows * row_bytes - bytes[member->rank]);
  guarded([&] {
    exchange(*member->group, static_cast<const char*>(source.const_data_ptr()), bytes, true,
             [&](int q, int64_t offset, const char* from, int64_t count) {
               std::memcpy(to + first_of(q, num_rows, size) * row_bytes + offset, from, count);
             });
  });
  return out;
}

// Columns of a [R, num_columns] matrix to rank 0; the others get [0, num_columns].
at::Tensor group_gather_columns(const at::Tensor& columns, int64_t num_columns, int64_t number) {
  const auto member = member_of(number);
  const int64_t size = member->size;
  const auto width = [&](int64_t q) {
    return first_of(q + 1, num_columns, size) - first_of(q, num_columns, size);
  };
  TORCH_CHECK(columns.dim() == 2 && columns.size(1) == width(member->rank), "rank ", member->rank,
              " of ", size, " has ", columns.sizes(), " of ", num_columns, " columns");
  const at::Tensor source = columns.contiguous();
  const int64_t num_rows = source.size(0), item = source.element_size();
  const bool receive = member->rank == 0;
  at::Tensor out = at::empty({receive ? num_rows : 0, num_columns}, source.options());
  if (member->dry) return out.zero_();
  std::vector<int64_t> bytes(size);
  for (int64_t q = 0; q < size; ++q) bytes[q] = num_rows * width(q) * item;
  note(*member, kGatherColumns, receive ? 0 : bytes[member->rank],
       receive ? num_rows * num_columns * item - bytes[0] : 0);
  char* to = static_cast<char*>(out.mutable_data_ptr());
  guarded([&] {
    exchange(*member->group, static_cast<const char*>(source.const_data_ptr()), bytes, receive,
             [&](int q, int64_t offset, const char* from, int64_t count) {
               const int64_t row_bytes = width(q) * item;
               while (count > 0) {  // pieces end anywhere: copy to the end of each row
                 const int64_t row = offset / row_bytes, column = offset % row_bytes;
                 const int64_t n = std::min(count, row_bytes - column);
                 char* place = to + (row * num_columns + first_of(q, num_columns, size)) * item;
                 std::memcpy(place + column, from, n);
                 from += n, offset += n, count -= n;
               }
             });
  });
  return out;
}

}  // namespace
}  // namespace remora

TORCH_LIBRARY_FRAGMENT(remora, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("group_open(int group, int address, int rank, int size, int capacity, int spin_us,"
        " int deadline_ms, int[] peer_sockets, int[] peer_ranks) -> ()", &remora::group_open);
  m.def("group_close(int group) -> ()", &remora::group_close);
  m.def("group_set_dry(int group, bool dry) -> ()", &remora::group_set_dry);
  m.def("group_abort(int group, str text) -> ()", &remora::group_abort);
  m.def("group_abort_text(int group) -> str", &remora::group_abort_text);
  m.def("group_reset(int group, int sequence) -> ()", &remora::group_reset);
  m.def("group_set_sequence(int group, int sequence) -> ()", &remora::group_set_sequence);
  m.def("group_sequence(int group) -> int", &remora::group_sequence);
  m.def("group_bytes(int size, int capacity) -> int", &remora::group_bytes);
  m.def("group_counters(int group) -> int[]", &remora::group_counters);
  m.def("group_sum(Tensor part, int group) -> Tensor", tags);
  m.def("group_gather_rows(Tensor rows, int num_rows, int group) -> Tensor", tags);
  m.def("group_gather_columns(Tensor columns, int num_columns, int group) -> Tensor", tags);
}

TORCH_LIBRARY_IMPL(remora, CPU, m) {
  m.impl("group_sum", &remora::group_sum);
  m.impl("group_gather_rows", &remora::group_gather_rows);
  m.impl("group_gather_columns", &remora::group_gather_columns);
}
