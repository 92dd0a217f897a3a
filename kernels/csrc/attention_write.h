// Stores keys and values in the page layout (kernels/attention.py): a key's words 16 apart, one
// value beside its neighbour's. T: an element; E: elements of a word.
#pragma once

#include "attention.h"

#include <cstring>

namespace remora_attention {

template <class T, int E>
inline void write_row(const char* k, const char* v, const Pages& pages, int64_t offset, int32_t* keys,
                      int32_t* values) {
  const int whole = pages.k_dim / E;
  for (int w = 0; w < whole; ++w) std::memcpy(&keys[w * 16 + offset], k + w * 4, 4);
  if (whole < pages.words) {  // half a word is left
    T last[E] = {};
    std::memcpy(last, k + whole * 4, sizeof(T));
    std::memcpy(&keys[whole * 16 + offset], last, 4);
  }
  T* row = reinterpret_cast<T*>(values + offset / E * pages.width) + offset % E;
  for (int d = 0; d < pages.v_dim; ++d) std::memcpy(&row[d * E], v + d * sizeof(T), sizeof(T));
  for (int d = pages.v_dim; d < pages.width; ++d) row[d * E] = T(0);
}

// One row's key and value of one head, into slot block * 16 + offset.
inline void write_slot(const Pages& pages, int64_t slot, int64_t head, const char* k, const char* v) {
  const int64_t block = slot / 16, offset = slot % 16;
  int32_t* keys = pages.keys + block * pages.key_block + head * pages.key_head;
  int32_t* values = pages.values + block * pages.value_block + head * pages.value_head;
  if (pages.element_bytes == 2)
    write_row<uint16_t, 2>(k, v, pages, offset, keys, values);
  else
    write_row<float, 1>(k, v, pages, offset, keys, values);
}

}  // namespace remora_attention
