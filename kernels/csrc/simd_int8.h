// Weights of one byte, sign and magnitude, widened to bfloat16 by permutations of bytes (AVX-512 with
// VBMI). No include guard: as simd_avx512.h, after it.

// Bytes of bfloat16(0..127), low and high, as tables for a permutation of bytes: an index has seven
// bits there, so the sign above them falls away by itself.
struct Bytes {
  alignas(64) uint8_t low[128];
  alignas(64) uint8_t high[128];
};

constexpr Bytes widened_bytes() {
  Bytes tables{};
  for (int value = 1; value < 128; ++value) {
    int exponent = 0;
    while ((value >> (exponent + 1)) != 0) ++exponent;
    const int mantissa = (value << (7 - exponent)) & 0x7f;
    const int bits = ((127 + exponent) << 7) | mantissa;
    tables.low[value] = static_cast<uint8_t>(bits & 0xff);
    tables.high[value] = static_cast<uint8_t>(bits >> 8);
  }
  return tables;
}

constexpr Bytes kBytes = widened_bytes();

// Four k of sixteen columns: two registers of two k each.
struct WideStep {
  __m512i first;
  __m512i second;
};

REMORA_INLINE WideStep widen_step(const uint8_t* w) {
  const __m512i bytes = _mm512_loadu_si512(w);
  const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(kBytes.low), bytes,
                                               _mm512_load_si512(kBytes.low + 64));
  const __m512i magnitude = _mm512_permutex2var_epi8(_mm512_load_si512(kBytes.high), bytes,
                                                     _mm512_load_si512(kBytes.high + 64));
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
  const __m512i high = _mm512_ternarylogic_epi32(magnitude, bytes, sign, 0xf8);  // a | (b & c)
  return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
}
