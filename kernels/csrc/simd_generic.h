// Sixteen float32 as a vector of the compiler's own, for any machine. No include guard: each user
// includes it once, inside its own namespace, with REMORA_TARGET defined to its function attribute.
// Multiply and add round separately (the build sets -ffp-contract=off).

#define REMORA_INLINE REMORA_TARGET __attribute__((always_inline)) static inline

typedef float Vec16 __attribute__((vector_size(64)));
typedef uint32_t Bits16 __attribute__((vector_size(64)));

REMORA_INLINE float widen_one(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
REMORA_INLINE float widen_one(float value) { return value; }

REMORA_INLINE void narrow_one(float value, float* target) { *target = value; }
REMORA_INLINE void narrow_one(float value, uint16_t* target) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  *target = value != value ? uint16_t{0x7fc0}
                           : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <class S>
struct Generic {
  using Scalar = S;
  using Input = S;
  using Stored = S;
  static constexpr bool kScaled = false;
  using Vec = Vec16;
  static constexpr int kRows = 4;
  static constexpr int panels(int) { return 1; }
  REMORA_INLINE Vec zero() { return Vec{}; }
  REMORA_INLINE Vec add_bias(Vec acc, const S* bias, int count) {
    for (int i = 0; i < count; ++i) acc[i] += widen_one(bias[i]);
    return acc;
  }
  REMORA_INLINE void store(S* target, const Vec& value, int count) {
    for (int i = 0; i < count; ++i) narrow_one(value[i], target + i);
  }

  static constexpr int kRowsHeld = 1;
  static constexpr bool kAsksForNextGroup = false;
  static constexpr int kParts = 1;
  static constexpr int kPrefetchLevel = 3;
  static constexpr bool kPrefetches = false;
  static constexpr int kLanes = 16;
  static constexpr int kDotRows = 1;
  static constexpr int kDotOutputs = 1;
  REMORA_INLINE Vec dot_lanes(Vec acc, const S* x, const S* w, int count) {
    for (int i = 0; i < count; ++i) acc[i] += widen_one(x[i]) * widen_one(w[i]);
    return acc;
  }
  REMORA_INLINE float sum(const Vec& value) {
    float total = 0.0f;
    for (int i = 0; i < kLanes; ++i) total += value[i];
    return total;
  }
  REMORA_INLINE float widen(S value) { return widen_one(value); }
  REMORA_INLINE void narrow(float value, S* target) { narrow_one(value, target); }
};
