// Paged attention and the write of keys and values into pages; see kernels/attention.py for the
// contract and the page layout, attention_kernel.h for the arithmetic.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "isa.h"
#include "phase.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace remora_attention {

struct WordF32 {
  static constexpr int num_elements = 1, element_bytes = 4;
};
struct WordBF16 {
  static constexpr int num_elements = 2, element_bytes = 2;
};

struct Rules {
  float scale, soft_cap;  // soft_cap 0: none
  int64_t window, chunk;  // 0: none
};

struct Pages {
  const int32_t *keys, *values;
  int64_t num_blocks, num_heads;
  int64_t key_words, value_words;  // of one block and head
  int v_dim;
};

struct Row {
  int64_t position, first;  // sees keys first..position
  void* out;
};

struct Tile {
  int words;         // of a key or query
  int width;         // value lanes, a multiple of 16
  int32_t* q_WR;     // packed queries: groups of ROWS_MAX rows, word by word
  float* max_R;      // running maximum
  float* sum_R16;    // running sum, by lane
  float* acc_RV;     // running output
  int32_t* edge_2V;  // value rows cut at the context's two ends
};

#define REMORA_ISA 0
namespace portable {
#include "attention_kernel.h"
}
#undef REMORA_ISA

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define REMORA_ISA 1
namespace avx2 {
#include "attention_kernel.h"
}
#undef REMORA_ISA
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#define REMORA_ISA 2
namespace avx512 {
#include "attention_kernel.h"
}
#undef REMORA_ISA
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#define REMORA_ISA 3
namespace avx512bf16 {
#include "attention_kernel.h"
}
#undef REMORA_ISA
#pragma GCC pop_options
#endif

namespace {

constexpr int64_t TILE_ROWS = 48;               // query rows that share one pass over the context
constexpr int64_t SERIAL_PRODUCTS = 1'000'000;  // below: waking a thread costs more than it saves

using RunTile = bool (*)(const Rules&, const Pages&, const int32_t*, const Tile&, const Row*, int, int);

struct Kernel {
  RunTile run_tile;
  int64_t rows_max;  // of a group
};

template <class Word>
Kernel choose(int level) {
#if defined(__x86_64__)
  if (level == 3) return {avx512bf16::run_tile<Word>, avx512bf16::ROWS_MAX};
  if (level == 2) return {avx512::run_tile<Word>, avx512::ROWS_MAX};
  if (level == 1) return {avx2::run_tile<Word>, avx2::ROWS_MAX};
#endif
  return {portable::run_tile<Word>, portable::ROWS_MAX};
}

int64_t first_visible(const Rules& rules, int64_t position) {
  int64_t first = rules.window > 0 ? std::max<int64_t>(0, position - rules.window + 1) : 0;
  if (rules.chunk > 0) first = std::max(first, position / rules.chunk * rules.chunk);
  return first;
}

struct Item {
  int32_t sequence, first_row, num_tokens, head;
};

// Scratch of one thread, 64-byte aligned, kept between calls.
struct Scratch {
  std::vector<float> memory;

  float* take(size_t count) {
    if (memory.size() < count + 16) memory.resize(count + 16);
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    return memory.data() + ((64 - address % 64) % 64) / sizeof(float);
  }
};

struct Call {
  Rules rules;
  Pages pages;
  Kernel kernel;
  const char* q;
  char* out;
  const float* sinks;  // nullptr: none
  int64_t q_row_bytes, q_head_bytes, out_row_bytes, out_head_bytes, element_bytes;
  int64_t k_dim;
  int words, width;
  int64_t group, tile_tokens;
  const int32_t *query_start, *start, *table;
  int64_t table_width;
};

bool run_item(const Call& call, const Item& item) {
  static thread_local Scratch scratch;
  static thread_local std::vector<Row> rows;
  static thread_local std::vector<int32_t> query;
  const int num_rows = static_cast<int>(item.num_tokens * call.group);
  const size_t padded = (num_rows + 15) / 16 * 16;
  const size_t word_room = (padded * call.words + 15) / 16 * 16;
  float* memory = scratch.take(padded + padded * 16 + padded * call.width + word_room +
                               2 * static_cast<size_t>(call.width));
  Tile tile{};
  tile.words = call.words;
  tile.width = call.width;
  tile.sum_R16 = memory;
  tile.acc_RV = tile.sum_R16 + padded * 16;
  tile.edge_2V = reinterpret_cast<int32_t*>(tile.acc_RV + padded * call.width);
  tile.q_WR = tile.edge_2V + 2 * call.width;
  tile.max_R = reinterpret_cast<float*>(tile.q_WR + word_room);
  std::memset(tile.sum_R16, 0, sizeof(float) * padded * 16);
  std::memset(tile.acc_RV, 0, sizeof(float) * padded * call.width);
  rows.resize(num_rows);
  query.resize(call.words);
  const int64_t sequence_row = call.query_start[item.sequence];
  for (int r = 0; r < num_rows; ++r) {
    const int64_t token_row = item.first_row + r / call.group;
    const int64_t head = item.head * call.group + r % call.group;
    const int64_t position = call.start[item.sequence] + token_row - sequence_row;
    rows[r] = Row{position, first_visible(call.rules, position),
                  call.out + token_row * call.out_row_bytes + head * call.out_head_bytes};
    query[call.words - 1] = 0;
    std::memcpy(query.data(), call.q + token_row * call.q_row_bytes + head * call.q_head_bytes,
                call.k_dim * call.element_bytes);
    const int64_t group = r - r % call.kernel.rows_max;
    const int64_t stride = std::min<int64_t>(call.kernel.rows_max, num_rows - group);
    int32_t* packed = tile.q_WR + group * call.words + r - group;
    for (int w = 0; w < call.words; ++w) packed[w * stride] = query[w];
    tile.max_R[r] = call.sinks ? call.sinks[head] : -INFINITY;
    if (call.sinks) tile.sum_R16[r * 16] = 1.0f;  // exp(sink - running maximum)
  }
  return call.kernel.run_tile(call.rules, call.pages, call.table + item.sequence * call.table_width, tile,
                              rows.data(), num_rows, item.head);
}

// Tiles of every sequence and key/value head, longest contexts first.
std::vector<Item> make_items(const Call& call, int64_t num_sequences, int64_t* num_products) {
  std::vector<Item> items;
  int64_t num_keys = 0;
  for (int64_t s = 0; s < num_sequences; ++s) {
    const int64_t begin = call.query_start[s], end = call.query_start[s + 1];
    const int64_t num_tiles = (end - begin + call.tile_tokens - 1) / call.tile_tokens;
    for (int64_t t = num_tiles - 1; t >= 0; --t) {
      const int64_t row = begin + t * call.tile_tokens;
      const int64_t count = std::min(call.tile_tokens, end - row);
      const int64_t last = call.start[s] + row + count - 1 - begin;
      num_keys += count * (last + 1 - first_visible(call.rules, last));
      for (int64_t h = 0; h < call.pages.num_heads; ++h)
        items.push_back(Item{static_cast<int32_t>(s), static_cast<int32_t>(row),
                             static_cast<int32_t>(count), static_cast<int32_t>(h)});
    }
  }
  *num_products = num_keys * call.pages.num_heads * call.group * (call.k_dim + call.width);
  return items;
}

// Every tile once, by whichever thread comes first. False: a block id was out of range.
bool run_items(const Call& call, int64_t num_sequences) {
  int64_t num_products = 0;
  const std::vector<Item> items = make_items(call, num_sequences, &num_products);
  const int64_t num_items = static_cast<int64_t>(items.size());
  std::atomic<int64_t> next{0};
  std::atomic<bool> good{true};
  const auto work = [&](int64_t, int64_t) {
    for (int64_t i = next++; i < num_items; i = next++)
      if (!run_item(call, items[i])) good = false;
  };
  const int64_t num_workers = std::min<int64_t>(at::get_num_threads(), num_items);
  if (num_products < SERIAL_PRODUCTS || num_workers < 2)
    work(0, 1);
  else
    at::parallel_for(0, num_workers, 1, work);
  return good;
}

Pages open_pages(const at::Tensor& k_pages, const at::Tensor& v_pages, int64_t v_dim) {
  TORCH_CHECK_VALUE(k_pages.dim() == 5 && v_pages.dim() == 5 && k_pages.is_contiguous() &&
                  v_pages.is_contiguous() && k_pages.scalar_type() == v_pages.scalar_type(),
              "KV pages must be contiguous [N, J, W, 16, E] and [N, J, 16 / E, D, E] of one dtype");
  TORCH_CHECK_VALUE(k_pages.scalar_type() == at::kBFloat16 || k_pages.scalar_type() == at::kFloat,
              "KV pages must be bfloat16 or float32, not ", k_pages.scalar_type());
  const int64_t e = k_pages.scalar_type() == at::kBFloat16 ? 2 : 1;
  TORCH_CHECK_VALUE(k_pages.size(3) == 16 && k_pages.size(4) == e && v_pages.size(4) == e &&
                  v_pages.size(2) == 16 / e && v_pages.size(3) % 16 == 0 &&
                  v_pages.size(3) >= v_dim && v_dim > 0 && k_pages.size(0) == v_pages.size(0) &&
                  k_pages.size(1) == v_pages.size(1),
              "KV pages of unexpected shape");
  Pages pages{};
  pages.keys = static_cast<const int32_t*>(k_pages.const_data_ptr());
  pages.values = static_cast<const int32_t*>(v_pages.const_data_ptr());
  pages.num_blocks = k_pages.size(0);
  pages.num_heads = k_pages.size(1);
  pages.key_words = k_pages.size(2) * 16;
  pages.value_words = v_pages.size(2) * v_pages.size(3);
  pages.v_dim = static_cast<int>(v_dim);
  return pages;
}

void check_attention(const at::Tensor& q, const at::Tensor& k_pages, const at::Tensor& query_start,
                     const at::Tensor& start, const at::Tensor& table,
                     const std::optional<at::Tensor>& sinks) {
  const int64_t elements = k_pages.size(4), num_sequences = start.size(0);
  TORCH_CHECK_VALUE(q.dim() == 3 && q.scalar_type() == k_pages.scalar_type() && q.stride(2) == 1,
              "queries must be [T, H, d] with contiguous rows, in the pages' dtype");
  TORCH_CHECK_VALUE(q.size(1) % k_pages.size(1) == 0 && q.size(2) <= k_pages.size(2) * elements &&
                  q.size(2) > (k_pages.size(2) - 1) * elements,
              "queries do not fit the pages: ", q.sizes(), " and ", k_pages.sizes());
  for (const at::Tensor* x : {&query_start, &start, &table})
    TORCH_CHECK_VALUE(x->scalar_type() == at::kInt && x->is_contiguous(), "plan tensors must be int32");
  TORCH_CHECK_VALUE(query_start.numel() == num_sequences + 1 && table.dim() == 2 &&
                  table.size(0) == num_sequences,
              "plan tensors disagree on the number of sequences");
  TORCH_CHECK_VALUE(!sinks || (sinks->scalar_type() == at::kFloat && sinks->is_contiguous() &&
                         sinks->numel() == q.size(1)),
              "sinks must be float32 [H]");
  const int32_t *rows = query_start.const_data_ptr<int32_t>(),
                *starts = start.const_data_ptr<int32_t>();
  for (int64_t s = 0; s < num_sequences; ++s) {
    const int64_t count = rows[s + 1] - rows[s];
    TORCH_CHECK_VALUE(rows[s] >= 0 && count >= 0 && starts[s] >= 0 &&
                    rows[s + 1] <= q.size(0) &&
                    starts[s] + count <= table.size(1) * 16,
                "plan out of range at sequence ", s);
  }
}

at::Tensor paged_attention(const at::Tensor& q, const at::Tensor& k_pages, const at::Tensor& v_pages,
                           int64_t v_dim, const at::Tensor& query_start, const at::Tensor& start,
                           const at::Tensor& table, double scale, int64_t window, int64_t chunk,
                           double soft_cap, const std::optional<at::Tensor>& sinks,
                           int64_t isa_max) {
  const remora::PhaseTimer timer(remora::Phase::kAttention);
  Call call{};
  call.pages = open_pages(k_pages, v_pages, v_dim);
  check_attention(q, k_pages, query_start, start, table, sinks);
  const int64_t elements = k_pages.size(4), num_sequences = start.size(0);
  call.rules = Rules{static_cast<float>(scale), static_cast<float>(soft_cap), window, chunk};
  call.element_bytes = q.element_size();
  const int level = static_cast<int>(std::min<int64_t>(static_cast<int64_t>(remora::isa()), isa_max));
  call.kernel = elements == 2 ? choose<WordBF16>(level) : choose<WordF32>(level);
  call.q = static_cast<const char*>(q.const_data_ptr());
  call.q_row_bytes = q.stride(0) * call.element_bytes;
  call.q_head_bytes = q.stride(1) * call.element_bytes;
  call.sinks = sinks ? sinks->const_data_ptr<float>() : nullptr;
  call.k_dim = q.size(2);
  call.words = static_cast<int>(k_pages.size(2));
  call.width = static_cast<int>(v_pages.size(3));
  call.group = q.size(1) / call.pages.num_heads;
  call.tile_tokens = std::max<int64_t>(1, TILE_ROWS / call.group);
  call.query_start = query_start.const_data_ptr<int32_t>();
  call.start = start.const_data_ptr<int32_t>();
  call.table = table.const_data_ptr<int32_t>();
  call.table_width = table.size(1);
  const int64_t num_tokens = num_sequences ? call.query_start[num_sequences] : 0;
  at::Tensor out = at::empty({q.size(0), q.size(1), v_dim}, q.options());
  call.out = static_cast<char*>(out.data_ptr());
  call.out_head_bytes = v_dim * call.element_bytes;
  call.out_row_bytes = q.size(1) * call.out_head_bytes;
  std::memset(call.out + num_tokens * call.out_row_bytes, 0,
              (q.size(0) - num_tokens) * call.out_row_bytes);
  TORCH_CHECK_VALUE(run_items(call, num_sequences), "a block id is outside the ",
                    call.pages.num_blocks, " blocks of the pages");
  return out;
}

template <class T, int E>
void write_row(const T* k, const T* v, int64_t k_dim, int64_t v_dim, int64_t width, int64_t offset,
               T* keys, T* values) {
  for (int64_t d = 0; d < k_dim; ++d) keys[(d / E * 16 + offset) * E + d % E] = k[d];
  if (k_dim % E != 0) keys[(k_dim / E * 16 + offset) * E + k_dim % E] = T(0);
  T* row = values + offset / E * width * E + offset % E;
  for (int64_t d = 0; d < v_dim; ++d) row[d * E] = v[d];
  for (int64_t d = v_dim; d < width; ++d) row[d * E] = T(0);
}

void write_kv(const at::Tensor& k, const at::Tensor& v, at::Tensor k_pages, at::Tensor v_pages,
              const at::Tensor& slots) {
  const remora::PhaseTimer timer(remora::Phase::kAttention);
  const Pages pages = open_pages(k_pages, v_pages, v.size(2));
  const int64_t num_rows = slots.numel(), k_dim = k.size(2), width = v_pages.size(3);
  const int64_t elements = k_pages.size(4);
  TORCH_CHECK_VALUE(k.dim() == 3 && v.dim() == 3 && k.size(0) == num_rows && v.size(0) == num_rows &&
                  k.size(1) == pages.num_heads && v.size(1) == pages.num_heads &&
                  (k_dim + elements - 1) / elements == k_pages.size(2) && k.stride(2) == 1 &&
                  v.stride(2) == 1 && k.scalar_type() == k_pages.scalar_type() &&
                  v.scalar_type() == k_pages.scalar_type(),
              "keys ", k.sizes(), " and values ", v.sizes(), " do not fit the pages");
  TORCH_CHECK_VALUE(slots.scalar_type() == at::kLong && slots.is_contiguous(), "slots must be int64");
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < num_rows; ++t)
    TORCH_CHECK_VALUE(slot[t] >= -1 && slot[t] < pages.num_blocks * 16, "slot ", slot[t], " of row ", t,
                ": the pages have ", pages.num_blocks * 16);
  const auto write = [&]<class T, int E>(T*) {
    const T *k_data = static_cast<const T*>(k.const_data_ptr()),
            *v_data = static_cast<const T*>(v.const_data_ptr());
    T *keys = static_cast<T*>(k_pages.data_ptr()), *values = static_cast<T*>(v_pages.data_ptr());
    at::parallel_for(0, num_rows, 64, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        if (slot[t] < 0) continue;
        for (int64_t h = 0; h < pages.num_heads; ++h) {
          const int64_t page = slot[t] / 16 * pages.num_heads + h;
          write_row<T, E>(k_data + t * k.stride(0) + h * k.stride(1),
                          v_data + t * v.stride(0) + h * v.stride(1), k_dim, v.size(2), width,
                          slot[t] % 16, keys + page * pages.key_words * E,
                          values + page * pages.value_words * E);
        }
      }
    });
  };
  if (elements == 2)
    write.template operator()<uint16_t, 2>(nullptr);
  else
    write.template operator()<float, 1>(nullptr);
}

}  // namespace
}  // namespace remora_attention

TORCH_LIBRARY_FRAGMENT(remora, m) {
  m.def(
      "paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, int v_dim, Tensor query_start, "
      "Tensor start, Tensor block_table, float scale, int window, int chunk, float soft_cap, "
      "Tensor? sinks, int isa_max) -> Tensor");
  m.def(
      "write_kv(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor slots) -> ()");
}

TORCH_LIBRARY_IMPL(remora, CPU, m) {
  m.impl("paged_attention", &remora_attention::paged_attention);
  m.impl("write_kv", &remora_attention::write_kv);
}
