// Sixteen float32 in two registers, for AVX2 with FMA. No include guard: each user includes it once,
// inside its own namespace, with REMORA_TARGET defined to its function attribute.
//
// Operations and their order are those of simd_avx512.h and panel_avx512.cpp.

#define REMORA_INLINE REMORA_TARGET __attribute__((always_inline)) static inline

struct Lanes {
  __m256 low;   // 0..7
  __m256 high;  // 8..15
};

REMORA_INLINE __m256 load_eight(const float* source) { return _mm256_loadu_ps(source); }

REMORA_INLINE __m256 load_eight(const uint16_t* source) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// The first `count` of sixteen, zeros behind them.
template <class S>
REMORA_INLINE Lanes load_lanes(const S* source, int count) {
  if (count == 16) return {load_eight(source), load_eight(source + 8)};
  S some[16] = {};
  for (int i = 0; i < count; ++i) some[i] = source[i];
  return {load_eight(some), load_eight(some + 8)};
}

REMORA_INLINE void store_sixteen(float* target, const Lanes& value) {
  _mm256_storeu_ps(target, value.low);
  _mm256_storeu_ps(target + 8, value.high);
}

// Bits of a bfloat16 in the lower half of each word: to nearest even; a NaN stays a NaN (quiet).
REMORA_INLINE __m256i round_eight(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  return _mm256_srli_epi32(
      _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
}

REMORA_INLINE void store_sixteen(uint16_t* target, const Lanes& value) {
  // Packing takes the registers' halves in turn; the permutation puts them in order.
  const __m256i packed = _mm256_packus_epi32(round_eight(value.low), round_eight(value.high));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm256_permute4x64_epi64(packed, 0xd8));
}

template <class S>
REMORA_INLINE void store_lanes(S* target, const Lanes& value, int count) {
  if (count == 16) return store_sixteen(target, value);
  S all[16];
  store_sixteen(all, value);
  for (int i = 0; i < count; ++i) target[i] = all[i];
}

// Sum of the lanes: halves, quarters, eighths, pairs.
REMORA_INLINE float sum_lanes(const Lanes& value) {
  __m256 sum = _mm256_add_ps(value.low, value.high);
  sum = _mm256_add_ps(sum, _mm256_permute2f128_ps(sum, sum, 1));
  sum = _mm256_add_ps(sum, _mm256_permute_ps(sum, 0x4e));
  sum = _mm256_add_ps(sum, _mm256_permute_ps(sum, 0xb1));
  return _mm256_cvtss_f32(sum);
}

REMORA_INLINE Lanes multiply_add(const Lanes& x, const Lanes& w, const Lanes& acc) {
  return {_mm256_fmadd_ps(x.low, w.low, acc.low), _mm256_fmadd_ps(x.high, w.high, acc.high)};
}

REMORA_INLINE Lanes multiply_add(__m256 x, const Lanes& w, const Lanes& acc) {
  return {_mm256_fmadd_ps(x, w.low, acc.low), _mm256_fmadd_ps(x, w.high, acc.high)};
}

template <class S>
struct Avx2 {
  using Scalar = S;
  using Input = S;
  using Stored = S;
  static constexpr bool kScaled = false;
  using Vec = Lanes;
  REMORA_INLINE Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  REMORA_INLINE Vec add_bias(const Vec& acc, const S* bias, int count) {
    const Lanes more = load_lanes(bias, count);
    return {_mm256_add_ps(acc.low, more.low), _mm256_add_ps(acc.high, more.high)};
  }
  REMORA_INLINE Vec scale(const Vec& acc, const float* scales, int count) {
    const Lanes by = load_lanes(scales, count);
    return {_mm256_mul_ps(acc.low, by.low), _mm256_mul_ps(acc.high, by.high)};
  }
  REMORA_INLINE void store(S* target, const Vec& value, int count) {
    store_lanes(target, value, count);
  }

  static constexpr int kRowsHeld = 3;
  static constexpr bool kAsksForNextGroup = true;
  static constexpr int kParts = 1;
  static constexpr int kPrefetchLevel = 2;
  static constexpr bool kPrefetches = true;
  static constexpr int kLanes = 16;
  static constexpr int kDotRows = 2;
  static constexpr int kDotOutputs = 2;
  REMORA_INLINE Vec dot_lanes(const Vec& acc, const S* x, const S* w, int count) {
    return multiply_add(load_lanes(x, count), load_lanes(w, count), acc);
  }
  REMORA_INLINE float sum(const Vec& value) { return sum_lanes(value); }
  REMORA_INLINE float widen(S value) {
    return _mm256_cvtss_f32(load_lanes(&value, 1).low);
  }
  REMORA_INLINE void narrow(float value, S* target) {
    store_lanes(target, Lanes{_mm256_set1_ps(value), _mm256_setzero_ps()}, 1);
  }
};
