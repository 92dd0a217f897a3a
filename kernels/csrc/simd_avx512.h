// Sixteen float32 in one register, for the AVX-512 files. No include guard: each includes it once,
// inside its own namespace, with REMORA_TARGET defined to its function attribute.

#define REMORA_INLINE REMORA_TARGET __attribute__((always_inline)) static inline

REMORA_INLINE __mmask16 first_lanes(int count) {
  return static_cast<__mmask16>((1u << count) - 1u);
}

REMORA_INLINE __m512 load_lanes(const float* source, int count) {
  return _mm512_maskz_loadu_ps(first_lanes(count), source);
}

REMORA_INLINE __m512 load_lanes(const uint16_t* source, int count) {
  const __m256i half = _mm256_maskz_loadu_epi16(first_lanes(count), source);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

REMORA_INLINE void store_lanes(float* target, __m512 value, int count) {
  _mm512_mask_storeu_ps(target, first_lanes(count), value);
}

// Round to nearest even; a NaN stays a NaN (quiet).
REMORA_INLINE void store_lanes(uint16_t* target, __m512 value, int count) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  _mm256_mask_storeu_epi16(target, first_lanes(count),
                           _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

// Sum of the lanes: halves, quarters, eighths, pairs.
REMORA_INLINE float sum_lanes(__m512 value) {
  value = _mm512_add_ps(value, _mm512_shuffle_f32x4(value, value, 0x4e));
  value = _mm512_add_ps(value, _mm512_shuffle_f32x4(value, value, 0xb1));
  value = _mm512_add_ps(value, _mm512_permute_ps(value, 0x4e));
  value = _mm512_add_ps(value, _mm512_permute_ps(value, 0xb1));
  return _mm512_cvtss_f32(value);
}

template <class S>
struct Avx512 {
  using Scalar = S;
  using Input = S;
  using Stored = S;
  static constexpr bool kScaled = false;
  using Vec = __m512;
  REMORA_INLINE Vec zero() { return _mm512_setzero_ps(); }
  REMORA_INLINE Vec add_bias(Vec acc, const S* bias, int count) {
    return _mm512_add_ps(acc, load_lanes(bias, count));
  }
  REMORA_INLINE Vec scale(Vec acc, const float* scales, int count) {
    return _mm512_mul_ps(acc, load_lanes(scales, count));
  }
  REMORA_INLINE void store(S* target, Vec value, int count) { store_lanes(target, value, count); }

  static constexpr int kRowsHeld = 1;
  static constexpr bool kAsksForNextGroup = false;
  static constexpr int kParts = 1;
  static constexpr int kPrefetchLevel = 3;
  static constexpr bool kPrefetches = true;
  static constexpr int kDotRows = 4;
  static constexpr int kDotOutputs = 4;
  REMORA_INLINE float sum(Vec value) { return sum_lanes(value); }
  REMORA_INLINE float widen(S value) { return _mm512_cvtss_f32(load_lanes(&value, 1)); }
  REMORA_INLINE void narrow(float value, S* target) {
    store_lanes(target, _mm512_set1_ps(value), 1);
  }
};
