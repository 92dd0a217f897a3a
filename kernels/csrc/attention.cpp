// The operators of paged attention; see kernels/attention.py for the contract and the page layout,
// attention.h for the parts.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "attend.h"
#include "attention.h"
#include "attention_write.h"
#include "isa.h"
#include "phase.h"
#include "team.h"

namespace remora_attention {
namespace {

constexpr int64_t PLAN_HEAD = 5;  // numbers before a plan's arrays

constexpr int64_t LINE_BYTES = 64;  // kernels load whole vectors

// Whether all blocks and heads from `first` on do, their strides in words.
bool is_aligned(const int32_t* first, int64_t block, int64_t head) {
  return (reinterpret_cast<uintptr_t>(first) | (block * 4) | (head * 4)) % LINE_BYTES == 0;
}

// `k_dim` and `v_dim` are the widths of the rows that the caller has.
Pages open_pages(const at::Tensor& k_pages, const at::Tensor& v_pages, int64_t k_dim, int64_t v_dim) {
  const bool narrow = k_pages.scalar_type() == at::kBFloat16;
  TORCH_CHECK_VALUE((narrow || k_pages.scalar_type() == at::kFloat) &&
                        k_pages.scalar_type() == v_pages.scalar_type(),
                    "KV pages must be bfloat16 or float32, not ", k_pages.scalar_type(), " and ",
                    v_pages.scalar_type());
  const int64_t e = narrow ? 2 : 1;
  TORCH_CHECK_VALUE(k_pages.dim() == 5 && v_pages.dim() == 5 && k_pages.size(3) == 16 &&
                        k_pages.size(4) == e && v_pages.size(4) == e && v_pages.size(2) == 16 / e &&
                        v_pages.size(3) % 16 == 0 && k_pages.size(0) == v_pages.size(0) &&
                        k_pages.size(1) == v_pages.size(1) && k_pages.stride(4) == 1 &&
                        k_pages.stride(3) == e && k_pages.stride(2) == 16 * e &&
                        v_pages.stride(4) == 1 && v_pages.stride(3) == e &&
                        v_pages.stride(2) == v_pages.size(3) * e,
                    "KV pages of unexpected shape: ", k_pages.sizes(), " and ", v_pages.sizes());
  TORCH_CHECK_VALUE(k_pages.size(2) == (k_dim + e - 1) / e && v_dim > 0 &&
                        v_pages.size(3) == (v_dim + 15) / 16 * 16,
                    "keys of ", k_dim, " and values of ", v_dim, " do not fit the pages: ",
                    k_pages.sizes(), " and ", v_pages.sizes());
  Pages pages{};
  pages.keys = static_cast<int32_t*>(const_cast<void*>(k_pages.const_data_ptr()));
  pages.values = static_cast<int32_t*>(const_cast<void*>(v_pages.const_data_ptr()));
  pages.num_blocks = k_pages.size(0);
  pages.num_heads = k_pages.size(1);
  pages.key_block = k_pages.stride(0) / e;
  pages.key_head = k_pages.stride(1) / e;
  pages.value_block = v_pages.stride(0) / e;
  pages.value_head = v_pages.stride(1) / e;
  pages.k_dim = static_cast<int>(k_dim);
  pages.v_dim = static_cast<int>(v_dim);
  pages.element_bytes = static_cast<int>(4 / e);
  pages.words = static_cast<int>(k_pages.size(2));
  pages.width = static_cast<int>(v_pages.size(3));
  TORCH_CHECK_VALUE(is_aligned(pages.keys, pages.key_block, pages.key_head) &&
                        is_aligned(pages.values, pages.value_block, pages.value_head),
                    "KV pages must lie at multiples of ", LINE_BYTES, " bytes");
  return pages;
}

Plan open_plan(const at::Tensor& tensor, int64_t num_rows, const Pages& pages) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kInt && tensor.is_contiguous() &&
                        tensor.numel() > PLAN_HEAD,
                    "a plan is an int32 tensor made by build_plan");
  const int32_t* data = tensor.const_data_ptr<int32_t>();
  Plan plan{data[0], data[1], data[2], data[3], data[4], data + PLAN_HEAD, nullptr, nullptr};
  plan.start = plan.query_start + plan.num_sequences + 1;
  plan.table = plan.start + plan.num_sequences;
  TORCH_CHECK_VALUE(plan.num_sequences >= 0 && plan.table_width >= 0 &&
                        tensor.numel() == PLAN_HEAD + 1 + plan.num_sequences * (2 + plan.table_width),
                    "a plan is an int32 tensor made by build_plan");
  TORCH_CHECK_VALUE(plan.num_rows == num_rows, num_rows, " rows: expected ", plan.num_rows);
  TORCH_CHECK_VALUE(plan.block_id_max < pages.num_blocks, "block ", plan.block_id_max, " of ",
                    pages.num_blocks);
  for (int64_t s = 0; s < plan.num_sequences; ++s) {
    const int64_t begin = plan.query_start[s], count = plan.query_start[s + 1] - begin;
    TORCH_CHECK_VALUE(begin >= 0 && count >= 1 && plan.start[s] >= 0 &&
                          plan.query_start[s + 1] <= plan.num_tokens &&
                          plan.start[s] + count <= plan.table_width * 16,
                      "plan out of range at sequence ", s);
  }
  return plan;
}

// A [T, heads, d] view of x, whose `row` and `head` dimensions are given and whose last is d.
Strided rows_of(const at::Tensor& x, int64_t row, int64_t head) {
  const int64_t bytes = x.element_size();
  return {static_cast<const char*>(x.const_data_ptr()), x.stride(row) * bytes, x.stride(head) * bytes};
}

// x in `dtype` with contiguous rows: x itself nearly always.
at::Tensor fit(const at::Tensor& x, at::ScalarType dtype) {
  at::Tensor y = x.scalar_type() == dtype ? x : x.to(dtype);
  return y.stride(-1) == 1 ? y : y.contiguous();
}

struct Options {
  double scale, soft_cap;
  int64_t window, chunk, isa_max;
};

// The call's rules, kernel and sinks; `sinks` keeps the latter alive.
void set_rules(Call* call, const Options& options, int64_t num_heads, std::optional<at::Tensor>* sinks) {
  TORCH_CHECK_VALUE(num_heads > 0 && call->pages.num_heads > 0 && num_heads % call->pages.num_heads == 0,
                    num_heads, " query heads over ", call->pages.num_heads, " key/value heads");
  call->group = num_heads / call->pages.num_heads;
  call->rules = Rules{static_cast<float>(options.scale), static_cast<float>(options.soft_cap),
                      options.window, options.chunk};
  int64_t level = std::min(static_cast<int64_t>(remora::isa()), options.isa_max);
  if (options.isa_max == kEmulatedTiles || (options.isa_max == 4 && remora::amx_is_emulated()))
    level = kEmulatedTiles;
  call->kernel = choose_kernel(call->pages.element_bytes == 2, static_cast<int>(level));
  // What tiles do not do: half a tile of a key's words, and maxima of scores of another sign.
  if (call->pages.words % 16 != 0 || call->rules.scale <= 0.0f || call->rules.soft_cap < 0.0f)
    call->kernel.run_tiled = nullptr;
  if (!*sinks) return;
  TORCH_CHECK_VALUE((*sinks)->numel() == num_heads, "sinks ", (*sinks)->sizes(), ": expected (",
                    num_heads, ",)");
  *sinks = (*sinks)->to(at::kFloat).contiguous();
  call->sinks = (*sinks)->const_data_ptr<float>();
}

void run_checked(const Call& call) {
  TORCH_CHECK_VALUE(run_attention(call), "a block id is outside the ", call.pages.num_blocks,
                    " blocks of the pages");
}

at::Tensor paged_attention(const at::Tensor& q, const at::Tensor& k_pages, const at::Tensor& v_pages,
                           int64_t v_dim, const at::Tensor& plan, double scale, int64_t window,
                           int64_t chunk, double soft_cap, std::optional<at::Tensor> sinks,
                           int64_t isa_max) {
  const remora::PhaseTimer timer(remora::Phase::kAttention);
  TORCH_CHECK_VALUE(q.dim() == 3 && q.scalar_type() == k_pages.scalar_type() && q.stride(2) == 1,
                    "queries must be [T, H, d] with contiguous rows, in the pages' dtype");
  Call call{};
  call.pages = open_pages(k_pages, v_pages, q.size(2), v_dim);
  call.plan = open_plan(plan, q.size(0), call.pages);
  call.q = rows_of(q, 0, 1);
  set_rules(&call, {scale, soft_cap, window, chunk, isa_max}, q.size(1), &sinks);
  at::Tensor out = at::empty({q.size(0), q.size(1), v_dim}, q.options());
  call.out = static_cast<char*>(out.data_ptr());
  run_checked(call);
  return out;
}

}  // namespace

at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::Tensor k_pages,
                  at::Tensor v_pages, const at::Tensor& plan, double scale, int64_t window,
                  int64_t chunk, double soft_cap, std::optional<at::Tensor> sinks, int64_t isa_max) {
  const remora::PhaseTimer timer(remora::Phase::kAttention);
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && q.size(0) == 1 &&
                        k.size(0) == 1 && v.size(0) == 1 && k.size(1) == k_pages.size(1) &&
                        v.size(1) == k_pages.size(1) && k.size(2) == q.size(2) &&
                        v.size(2) == q.size(2) && k.size(3) == q.size(3),
                    "queries ", q.sizes(), ", keys ", k.sizes(), ", values ", v.sizes(),
                    ": expected [1, H, T, k_dim], [1, J, T, k_dim], [1, J, T, v_dim] with J = ",
                    k_pages.size(1));
  const at::ScalarType dtype = k_pages.scalar_type();
  const at::Tensor fit_q = fit(q, dtype), fit_k = fit(k, dtype), fit_v = fit(v, dtype);
  const Strided k_rows = rows_of(fit_k, 2, 1), v_rows = rows_of(fit_v, 2, 1);
  Call call{};
  call.pages = open_pages(k_pages, v_pages, q.size(3), v.size(3));
  call.plan = open_plan(plan, q.size(2), call.pages);
  call.q = rows_of(fit_q, 2, 1);
  call.k = &k_rows;
  call.v = &v_rows;
  set_rules(&call, {scale, soft_cap, window, chunk, isa_max}, q.size(1), &sinks);
  at::Tensor out = at::empty({1, q.size(2), q.size(1), v.size(3)}, fit_q.options());
  call.out = static_cast<char*>(out.data_ptr());
  run_checked(call);
  return q.scalar_type() == dtype ? out : out.to(q.scalar_type());
}

namespace {

void write_kv(const at::Tensor& k, const at::Tensor& v, at::Tensor k_pages, at::Tensor v_pages,
              const at::Tensor& slots) {
  const remora::PhaseTimer timer(remora::Phase::kAttention);
  TORCH_CHECK_VALUE(k.dim() == 3 && v.dim() == 3, "keys and values must be [T, J, d]");
  const Pages pages = open_pages(k_pages, v_pages, k.size(2), v.size(2));
  const int64_t num_rows = slots.numel();
  TORCH_CHECK_VALUE(k.size(0) == num_rows && v.size(0) == num_rows && k.size(1) == pages.num_heads &&
                        v.size(1) == pages.num_heads && k.stride(2) == 1 && v.stride(2) == 1 &&
                        k.scalar_type() == k_pages.scalar_type() &&
                        v.scalar_type() == k_pages.scalar_type(),
                    "keys ", k.sizes(), " and values ", v.sizes(), " do not fit the pages");
  TORCH_CHECK_VALUE(slots.scalar_type() == at::kLong && slots.is_contiguous(), "slots must be int64");
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < num_rows; ++t)
    TORCH_CHECK_VALUE(slot[t] >= -1 && slot[t] < pages.num_blocks * 16, "slot ", slot[t], " of row ", t,
                      ": the pages have ", pages.num_blocks * 16);
  const Strided k_rows = rows_of(k, 0, 1), v_rows = rows_of(v, 0, 1);
  const int64_t workers = std::clamp<int64_t>(num_rows / 64, 1, remora::team_size());
  remora::team_run(static_cast<int>(workers), [&](int w) {
    for (int64_t t = num_rows * w / workers; t < num_rows * (w + 1) / workers; ++t)
      for (int64_t h = 0; slot[t] >= 0 && h < pages.num_heads; ++h)
        write_slot(pages, slot[t], h, k_rows.at(t, h), v_rows.at(t, h));
  });
}

}  // namespace
}  // namespace remora_attention

TORCH_LIBRARY_FRAGMENT(remora, m) {
  m.def(
      "paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, int v_dim, Tensor plan, "
      "float scale, int window, int chunk, float soft_cap, Tensor? sinks, int isa_max) -> Tensor");
  m.def(
      "attend(Tensor q, Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor plan, "
      "float scale, int window, int chunk, float soft_cap, Tensor? sinks, int isa_max) -> Tensor");
  m.def(
      "write_kv(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor slots) -> ()");
}

TORCH_LIBRARY_IMPL(remora, CPU, m) {
  m.impl("paged_attention", &remora_attention::paged_attention);
  m.impl("attend", &remora_attention::attend);
  m.impl("write_kv", &remora_attention::write_kv);
}
