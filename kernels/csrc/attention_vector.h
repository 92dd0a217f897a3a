// Sixteen lanes of 32 bits, for one instruction set: see attention_kernel.h, which includes this once
// per set, inside a namespace.

typedef float f32x16 __attribute__((vector_size(64), may_alias));
typedef int32_t i32x16 __attribute__((vector_size(64), may_alias));
typedef int32_t i32x16u __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint16_t u16x16u __attribute__((vector_size(32), aligned(2), may_alias));

#define REMORA_INLINE static inline __attribute__((always_inline))
#define REMORA_LOOP static __attribute__((noinline))

template <class F>
REMORA_INLINE F all_lanes(float x) { return F{} + x; }
REMORA_INLINE f32x16 splat(float x) { return all_lanes<f32x16>(x); }
REMORA_INLINE i32x16 splat_word(int32_t x) { return i32x16{} + x; }
REMORA_INLINE i32x16 load_words(const int32_t* p) { return *(const i32x16*)p; }
REMORA_INLINE f32x16 load(const float* p) { return *(const f32x16*)p; }
REMORA_INLINE void store(float* p, f32x16 x) { *(f32x16*)p = x; }

#if REMORA_ISA == 1
typedef float f32x8 __attribute__((vector_size(32), may_alias));
typedef int32_t i32x8 __attribute__((vector_size(32), may_alias));
union Halves {
  f32x16 whole;
  f32x8 half[2];
};
REMORA_INLINE f32x8 multiply_add(f32x8 a, f32x8 b, f32x8 c) {
  return (f32x8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
#endif

REMORA_INLINE f32x16 multiply_add(f32x16 a, f32x16 b, f32x16 c) {
#if REMORA_ISA >= 2
  return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif REMORA_ISA == 1
  Halves x{a}, y{b}, z{c};
  z.half[0] = multiply_add(x.half[0], y.half[0], z.half[0]);
  z.half[1] = multiply_add(x.half[1], y.half[1], z.half[1]);
  return z.whole;
#else
  return a * b + c;
#endif
}

// What the loops over keys hold: sums, and words of keys or values. A vector wider than a register is
// kept in memory by the compiler, so on AVX2 both are two registers.
#if REMORA_ISA == 1
struct Sums {
  __m256 half[2];
};
struct Words {
  __m256i half[2];
};
REMORA_INLINE Sums splat_sums(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
REMORA_INLINE Words words_at(const int32_t* p) {
  return {{_mm256_load_si256((const __m256i*)p), _mm256_load_si256((const __m256i*)(p + 8))}};
}
REMORA_INLINE Sums scaled_sums(const float* p, float factor) {
  const __m256 by = _mm256_set1_ps(factor);
  return {{_mm256_mul_ps(_mm256_load_ps(p), by), _mm256_mul_ps(_mm256_load_ps(p + 8), by)}};
}
REMORA_INLINE void store(float* p, const Sums& x) {
  _mm256_store_ps(p, x.half[0]);
  _mm256_store_ps(p + 8, x.half[1]);
}
#else
using Sums = f32x16;
using Words = i32x16;
REMORA_INLINE Sums splat_sums(float x) { return splat(x); }
REMORA_INLINE Words words_at(const int32_t* p) { return load_words(p); }
REMORA_INLINE Sums scaled_sums(const float* p, float factor) { return load(p) * splat(factor); }
#endif

// acc + the products of words, element by element of a word: Word is float or BF16 (two of them).
template <class Word>
REMORA_INLINE Sums dot(Sums acc, Words a, int32_t b) {
#if REMORA_ISA == 1
  const __m256i word = _mm256_set1_epi32(b);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    if constexpr (Word::num_elements == 1) {
      acc.half[i] = _mm256_fmadd_ps((__m256)a.half[i], (__m256)word, acc.half[i]);
    } else {
      const __m256i high = _mm256_set1_epi32((int32_t)0xffff0000);
      acc.half[i] = _mm256_fmadd_ps((__m256)_mm256_slli_epi32(a.half[i], 16),
                                    (__m256)_mm256_slli_epi32(word, 16), acc.half[i]);
      acc.half[i] = _mm256_fmadd_ps((__m256)_mm256_and_si256(a.half[i], high),
                                    (__m256)_mm256_and_si256(word, high), acc.half[i]);
    }
  }
  return acc;
#else
  if constexpr (Word::num_elements == 1) {
    return multiply_add((f32x16)a, (f32x16)splat_word(b), acc);
  } else {
#if REMORA_ISA == 3
    return (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)splat_word(b));
#else
    const i32x16 high = splat_word((int32_t)0xffff0000);
    const i32x16 b16 = splat_word(b);
    acc = multiply_add((f32x16)(a << 16), (f32x16)(b16 << 16), acc);
    return multiply_add((f32x16)(a & high), (f32x16)(b16 & high), acc);
#endif
  }
#endif
}

REMORA_INLINE u16x16 round_bf16(f32x16 x) {
#if REMORA_ISA == 3
  return (u16x16)_mm512_cvtneps_pbh((__m512)x);
#else
  const u32x16 bits = (u32x16)x;
  const u32x16 rounded = (bits + (0x7fffu + ((bits >> 16) & 1u))) >> 16;
  return __builtin_convertvector(rounded, u16x16);
#endif
}

REMORA_INLINE f32x16 max16(f32x16 a, f32x16 b) { return a > b ? a : b; }

// The larger one; b where a is no number.
REMORA_INLINE f32x16 largest16(f32x16 a, f32x16 b) {
#if REMORA_ISA >= 2
  return (f32x16)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return max16(a, b);
#endif
}

REMORA_INLINE float max_lane(f32x16 x) {
#if REMORA_ISA >= 2
  return _mm512_reduce_max_ps((__m512)x);
#else
  float best = x[0];
  for (int i = 1; i < 16; ++i) best = x[i] > best ? x[i] : best;
  return best;
#endif
}

REMORA_INLINE float sum_lanes(f32x16 x) {
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) x[i] = x[i] + x[i + width];
  return x[0];
}

// exp for x <= 88, relative error below 2e-7; exactly 1 at 0 and exactly 0 below -87.
// Range reduction by log 2 in two parts, Taylor polynomial of degree 7 on |r| <= log(2) / 2.
template <class F, class I>
REMORA_INLINE F exp_lanes(F x) {
  const F clamped = x < all_lanes<F>(-87.0f) ? all_lanes<F>(-87.0f) : x;
  const F magic = all_lanes<F>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const F shifted = multiply_add(clamped, all_lanes<F>(1.44269504088896341f), magic);
  const F n = shifted - magic;
  F r = multiply_add(n, all_lanes<F>(-0.693145751953125f), clamped);
  r = multiply_add(n, all_lanes<F>(-1.42860682030941723e-6f), r);
  F y = all_lanes<F>(1.0f / 5040.0f);
  y = multiply_add(y, r, all_lanes<F>(1.0f / 720.0f));
  y = multiply_add(y, r, all_lanes<F>(1.0f / 120.0f));
  y = multiply_add(y, r, all_lanes<F>(1.0f / 24.0f));
  y = multiply_add(y, r, all_lanes<F>(1.0f / 6.0f));
  y = multiply_add(y, r, all_lanes<F>(0.5f));
  y = multiply_add(y, r, all_lanes<F>(1.0f));
  y = multiply_add(y, r, all_lanes<F>(1.0f));
  const I exponent = ((I)shifted - (I)magic + 127) << 23;
  y = y * (F)exponent;
  return x < all_lanes<F>(-87.0f) ? all_lanes<F>(0.0f) : y;
}

REMORA_INLINE f32x16 exp16(f32x16 x) {
#if REMORA_ISA == 1
  Halves both{x};
  both.half[0] = exp_lanes<f32x8, i32x8>(both.half[0]);
  both.half[1] = exp_lanes<f32x8, i32x8>(both.half[1]);
  return both.whole;
#else
  return exp_lanes<f32x16, i32x16>(x);
#endif
}

// 2^x for x <= 127, relative error 2e-7; exactly 1 at 0, 0 at -infinity. 1 + f * polynomial of degree
// 4 for the fraction f in [0, 1), fitted for the least largest relative error (Lawson's iteration).
REMORA_INLINE f32x16 exp2_16(f32x16 x) {
#if REMORA_ISA >= 2
  const f32x16 f = (f32x16)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);
#else
  const f32x16 clamped = x < splat(-127.0f) ? splat(-127.0f) : x;
  const f32x16 toward_zero = __builtin_convertvector(__builtin_convertvector(clamped, i32x16), f32x16);
  const f32x16 floor = toward_zero > clamped ? toward_zero - splat(1.0f) : toward_zero;
  const f32x16 f = clamped - floor;
#endif
  f32x16 y = splat(0.00186713f);
  y = multiply_add(y, f, splat(0.00901703f));
  y = multiply_add(y, f, splat(0.05579991f));
  y = multiply_add(y, f, splat(0.24016445f));
  y = multiply_add(y, f, splat(0.69315131f));
  y = multiply_add(y, f, splat(1.0f));
#if REMORA_ISA >= 2
  return (f32x16)_mm512_scalef_ps((__m512)y, (__m512)x);  // by two to the floor of x
#else
  y = y * (f32x16)((__builtin_convertvector(floor, i32x16) + 127) << 23);
  return x < splat(-126.0f) ? splat(0.0f) : y;
#endif
}

REMORA_INLINE f32x16 tanh16(f32x16 x) {
  const f32x16 size = x < splat(0.0f) ? -x : x;
  const f32x16 bound = size > splat(20.0f) ? splat(20.0f) : size;
  const f32x16 large = splat(1.0f) - splat(2.0f) / (exp16(bound + bound) + splat(1.0f));
  const f32x16 square = bound * bound;  // Taylor series where the quotient would cancel
  f32x16 y = splat(62.0f / 2835.0f);
  y = multiply_add(y, square, splat(-17.0f / 315.0f));
  y = multiply_add(y, square, splat(2.0f / 15.0f));
  y = multiply_add(y, square, splat(-1.0f / 3.0f));
  y = multiply_add(y, square, splat(1.0f));
  const f32x16 magnitude = bound < splat(0.2f) ? y * bound : large;
  return x < splat(0.0f) ? -magnitude : magnitude;
}
