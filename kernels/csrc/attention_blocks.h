// Keys and values of sixteen tokens in a row, which fill a block. Included as attention_kernel.h is.

// Transposes sixteen rows of sixteen words: in blocks of 8, 4, 2 and 1, [[a, b], [c, d]] becomes
// [[a, c], [b, d]].
template <int D>
REMORA_INLINE void swap_blocks(i32x16* row) {
  const i32x16 iota = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const i32x16 above = (iota & D) == 0 ? iota : iota - D + 16;
  const i32x16 below = (iota & D) == 0 ? iota + D : iota + 16;
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if ((i & D) != 0) continue;
    const i32x16 a = row[i], b = row[i + D];
    row[i] = __builtin_shuffle(a, b, above);
    row[i + D] = __builtin_shuffle(a, b, below);
  }
}

// Kernel::write_block.
template <class Word>
static void write_block(const Pages& pages, int64_t block, int64_t head, const char* k,
                        int64_t k_row_bytes, const char* v, int64_t v_row_bytes) {
  int32_t* keys = pages.keys + block * pages.key_block + head * pages.key_head;
  int32_t* values = pages.values + block * pages.value_block + head * pages.value_head;
  for (int w = 0; w < pages.words; w += 16) {
    i32x16 row[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) row[i] = *(const i32x16u*)(k + i * k_row_bytes + w * 4);
    swap_blocks<8>(row);
    swap_blocks<4>(row);
    swap_blocks<2>(row);
    swap_blocks<1>(row);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) *(i32x16*)(keys + (w + i) * 16) = row[i];
  }
  for (int i = 0; i < 16; i += Word::num_elements, v += Word::num_elements * v_row_bytes)
    for (int lane = 0; lane < pages.width; lane += 16, values += 16) {
      if constexpr (Word::num_elements == 1) {
        *(i32x16*)values = *(const i32x16u*)(v + lane * 4);
      } else {
        const u16x16 even = *(const u16x16u*)(v + lane * 2);
        const u16x16 odd = *(const u16x16u*)(v + v_row_bytes + lane * 2);
        *(i32x16*)values = __builtin_convertvector(even, i32x16) |
                           __builtin_convertvector(odd, i32x16) << 16;
      }
    }
}
