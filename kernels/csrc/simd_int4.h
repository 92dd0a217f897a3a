// Weights of four bits widened to bfloat16 by permutations of bytes (AVX-512 with VBMI). No include
// guard: as simd_avx512.h, after it.
//
// A table has the bytes of weight times (4 + m) / 4 * 2^kInt4Exponent for all 16 weights and 4 m;
// e is taken from the exponent afterwards. A difference of whole words below zero is zero, and so
// stays a weight of zero; others never get there, since the exponent of 1 is larger than any e.

struct NibbleTables {
  alignas(64) uint8_t low[64];
  alignas(64) uint8_t high[64];
};

constexpr NibbleTables nibble_tables() {
  NibbleTables tables{};
  for (int index = 0; index < 64; ++index) {
    const int value = (index & 7) * (4 + (index >> 4));  // times a quarter
    if (value == 0) continue;
    int exponent = 0;
    while ((value >> (exponent + 1)) != 0) ++exponent;
    const int mantissa = (value << (7 - exponent)) & 0x7f;
    const int sign = (index & 8) << 12;
    const int bits = sign | ((127 + exponent - 2 + kInt4Exponent) << 7) | mantissa;
    tables.low[index] = static_cast<uint8_t>(bits & 0xff);
    tables.high[index] = static_cast<uint8_t>(bits >> 8);
  }
  return tables;
}

constexpr NibbleTables kNibbles = nibble_tables();

// Where the bytes of 16 columns' scales go: to both words of a column of a widened step, and beside
// the column's bytes of a line.
struct ScalePlaces {
  alignas(64) uint8_t words[64];
  alignas(64) uint8_t bytes[64];
};

constexpr ScalePlaces scale_places() {
  ScalePlaces places{};
  for (int i = 0; i < 64; ++i) {
    places.words[i] = static_cast<uint8_t>(i / 4);
    places.bytes[i] = static_cast<uint8_t>(i / 16 * 4 + i % 8 / 2);
  }
  return places;
}

constexpr ScalePlaces kScalePlaces = scale_places();

// Of 16 columns: e as the exponent of a bfloat16, and m above the bits of a weight.
struct Int4Scales {
  __m512i exponents;
  __m512i fractions;
};

// Eight k of sixteen columns: four registers of two k each.
struct Int4Line {
  __m512i pairs[4];
};

REMORA_INLINE Int4Scales load_int4_scales(const uint8_t* scales) {
  const __m512i bytes =
      _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)));
  const __m512i words = _mm512_permutexvar_epi8(_mm512_load_si512(kScalePlaces.words), bytes);
  const __m512i beside = _mm512_permutexvar_epi8(_mm512_load_si512(kScalePlaces.bytes), bytes);
  return {_mm512_slli_epi16(_mm512_and_si512(words, _mm512_set1_epi16(0xfc)), 5),
          _mm512_and_si512(_mm512_slli_epi16(beside, 4), _mm512_set1_epi8(0x30))};
}

REMORA_INLINE Int4Line widen_line(const uint8_t* w, const Int4Scales& scales) {
  const __m512i bytes = _mm512_loadu_si512(w);
  const __m512i nibble = _mm512_set1_epi8(0x0f);
  const __m512i halves[2] = {
      _mm512_ternarylogic_epi32(bytes, nibble, scales.fractions, 0xea),  // (a & b) | c
      _mm512_ternarylogic_epi32(_mm512_srli_epi16(bytes, 4), nibble, scales.fractions, 0xea)};
  Int4Line line;
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const __m512i low = _mm512_permutexvar_epi8(halves[half], _mm512_load_si512(kNibbles.low));
    const __m512i high = _mm512_permutexvar_epi8(halves[half], _mm512_load_si512(kNibbles.high));
    line.pairs[2 * half] = _mm512_subs_epu16(_mm512_unpacklo_epi8(low, high), scales.exponents);
    line.pairs[2 * half + 1] = _mm512_subs_epu16(_mm512_unpackhi_epi8(low, high), scales.exponents);
  }
  return line;
}
