// Weights as they are read to packed ones (panel.h), back, and whether both hold the same bits.
//
// Packing is a transposition of 32-bit words: a float32, or two neighbouring inputs in bfloat16. It
// goes in blocks of one cache line of a row, so that every line that is read is used up, and what is
// written (16 steps of one group, 4 KiB) stays in the first cache. torch's strided copy, a word at a
// time down a column, took 4 times as long and more. One thread: an idle one packs beside the one
// that serves, and must not take its team.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "packed_shape.h"
#include "weight_format.h"

namespace remora {
namespace {

constexpr int64_t kWord = 4;          // bytes
constexpr int64_t kBlockSteps = 16;   // words of a cache line

// Up to 16 words of one row, and where they lie packed: `stride` words apart.
struct Block {
  char* row;
  int64_t row_bytes;  // of this block; below a multiple of a word where the inputs end in one
  uint32_t* packed;
  int64_t stride;
  int64_t num_words;
};

struct Pack {
  static bool visit(const Block& block) {
    uint32_t words[kBlockSteps] = {};
    std::memcpy(words, block.row, block.row_bytes);
    for (int64_t i = 0; i < block.num_words; ++i) block.packed[i * block.stride] = words[i];
    return true;
  }
};

struct Unpack {
  static bool visit(const Block& block) {
    uint32_t words[kBlockSteps];
    for (int64_t i = 0; i < block.num_words; ++i) words[i] = block.packed[i * block.stride];
    std::memcpy(block.row, words, block.row_bytes);
    return true;
  }
};

struct Compare {
  static bool visit(const Block& block) {
    uint32_t words[kBlockSteps] = {};
    std::memcpy(words, block.row, block.row_bytes);
    uint32_t differing = 0;
    for (int64_t i = 0; i < block.num_words; ++i) differing |= words[i] ^ block.packed[i * block.stride];
    return differing == 0;
  }
};

// Every block of a weight [O, K] whose rows lie one after the other; false once a visit was.
template <class Visitor>
bool for_each_block(char* rows, const PackedShape& shape, uint32_t* packed) {
  const int64_t row_bytes = shape.num_inputs * shape.element_size();
  const int64_t num_steps = shape.num_steps();
  for (int64_t group = 0; group < shape.num_groups(); ++group) {
    const int64_t column = group * kGroup;
    const int64_t width = std::min(kGroupPanels, shape.num_panels() - group * kGroupPanels) * kPanel;
    const int64_t num_columns = std::min(width, shape.num_outputs - column);
    uint32_t* const out = packed + column * num_steps;
    for (int64_t step = 0; step < num_steps; step += kBlockSteps) {
      const int64_t num_words = std::min(kBlockSteps, num_steps - step);
      const int64_t num_bytes = std::min(num_words * kWord, row_bytes - step * kWord);
      for (int64_t i = 0; i < num_columns; ++i) {
        char* const row = rows + (column + i) * row_bytes + step * kWord;
        if (!Visitor::visit({row, num_bytes, out + step * width + i, width, num_words})) return false;
      }
    }
  }
  return true;
}

// Columns beyond the outputs, which no row has.
void clear_padding(const PackedShape& shape, uint32_t* packed) {
  const int64_t missing = shape.num_panels() * kPanel - shape.num_outputs;
  if (missing == 0) return;
  const int64_t column = (shape.num_groups() - 1) * kGroup;
  const int64_t width = shape.num_panels() * kPanel - column;
  uint32_t* out = packed + column * shape.num_steps() + width - missing;
  for (int64_t step = 0; step < shape.num_steps(); ++step, out += width) std::fill_n(out, missing, 0u);
}

PackedShape shape_of(const at::Tensor& packed, int64_t num_outputs, int64_t num_inputs) {
  const PackedShape shape{num_inputs, num_outputs, weight_format(packed.scalar_type(), {})};
  TORCH_CHECK(num_outputs > 0 && num_inputs > 0 && fits(packed, shape, 1), "a packed weight of ",
              packed.numel(), " ", packed.scalar_type(), " is none of [", num_outputs, ", ", num_inputs, "]");
  return shape;
}

PackedShape shape_of(const at::Tensor& packed, const at::Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous() && weight.scalar_type() == packed.scalar_type(),
              "weight must be [O, K], contiguous and ", packed.scalar_type(), ", got ", weight.sizes(), " ",
              weight.scalar_type());
  return shape_of(packed, weight.size(0), weight.size(1));
}

// Of what a visitor only reads: it gets the same pointers as those that write.
char* bytes_of(const at::Tensor& tensor) { return static_cast<char*>(const_cast<void*>(tensor.const_data_ptr())); }
uint32_t* words_of(const at::Tensor& packed) { return reinterpret_cast<uint32_t*>(bytes_of(packed)); }

void pack_weight(const at::Tensor& packed, const at::Tensor& weight) {
  const PackedShape shape = shape_of(packed, weight);
  uint32_t* const words = static_cast<uint32_t*>(packed.mutable_data_ptr());
  for_each_block<Pack>(bytes_of(weight), shape, words);
  clear_padding(shape, words);
}

at::Tensor unpack_weight(const at::Tensor& packed, int64_t num_outputs, int64_t num_inputs) {
  const PackedShape shape = shape_of(packed, num_outputs, num_inputs);
  at::Tensor weight = at::empty({num_outputs, num_inputs}, packed.options());
  for_each_block<Unpack>(static_cast<char*>(weight.mutable_data_ptr()), shape, words_of(packed));
  return weight;
}

bool packed_equals(const at::Tensor& packed, const at::Tensor& weight) {
  return for_each_block<Compare>(bytes_of(weight), shape_of(packed, weight), words_of(packed));
}

}  // namespace
}  // namespace remora

TORCH_LIBRARY_FRAGMENT(remora, m) {
  m.def("pack_weight(Tensor(a!) packed, Tensor weight) -> ()");
  m.def("unpack_weight(Tensor packed, int num_outputs, int num_inputs) -> Tensor");
  m.def("packed_equals(Tensor packed, Tensor weight) -> bool");
}

TORCH_LIBRARY_IMPL(remora, CPU, m) {
  m.impl("pack_weight", &remora::pack_weight);
  m.impl("unpack_weight", &remora::unpack_weight);
  m.impl("packed_equals", &remora::packed_equals);
}
