// The tiles of any machine; see simd_generic.h. Included once per namespace.

struct Float : Generic<float> {
  using Weights = Vec16;
  static constexpr int kScalarsPerStep = 1;
  REMORA_INLINE Weights load_weights(const float* w) {
    Weights result;
    std::memcpy(&result, w, sizeof result);
    return result;
  }
  REMORA_INLINE float load_x(const float* x) { return *x; }
  REMORA_INLINE Vec dot(const Vec& acc, float x, const Weights& w) { return acc + x * w; }
};

struct PairX {
  float even;
  float odd;
};

struct PairWeights {
  Vec16 even;
  Vec16 odd;
};

struct BFloat16 : Generic<uint16_t> {
  using Weights = PairWeights;
  static constexpr int kScalarsPerStep = 2;
  REMORA_INLINE Weights load_weights(const uint16_t* w) {
    Bits16 pairs;
    std::memcpy(&pairs, w, sizeof pairs);
    return {reinterpret_cast<Vec16>(pairs << 16), reinterpret_cast<Vec16>(pairs & 0xffff0000u)};
  }
  REMORA_INLINE PairX load_x(const uint16_t* x) { return {widen_one(x[0]), widen_one(x[1])}; }
  REMORA_INLINE Vec dot(const Vec& acc, const PairX& x, const Weights& w) {
    return (acc + x.even * w.even) + x.odd * w.odd;
  }
};
