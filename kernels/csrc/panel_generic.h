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

// Four k of sixteen columns, widened one value at a time.
struct QuadWeights {
  Vec16 k[4];
};

struct QuadX {
  float k[4];
};

struct Int8 : Generic<uint16_t> {
  using Stored = uint8_t;
  using Weights = QuadWeights;
  static constexpr bool kScaled = true;
  static constexpr int kScalarsPerStep = 4;
  REMORA_INLINE Weights load_weights(const uint8_t* w) {
    Weights result;
    for (int k = 0; k < 4; ++k) {
      for (int column = 0; column < 16; ++column) {
        const uint8_t byte = w[column / 4 * 16 + k / 2 * 8 + column % 4 * 2 + k % 2];
        const float magnitude = static_cast<float>(byte & 0x7f);
        result.k[k][column] = byte & 0x80 ? -magnitude : magnitude;
      }
    }
    return result;
  }
  REMORA_INLINE QuadX load_x(const uint16_t* x) {
    return {{widen_one(x[0]), widen_one(x[1]), widen_one(x[2]), widen_one(x[3])}};
  }
  REMORA_INLINE Vec dot(Vec acc, const QuadX& x, const Weights& w) {
    for (int k = 0; k < 4; ++k) acc = acc + x.k[k] * w.k[k];
    return acc;
  }
  REMORA_INLINE Vec scale(Vec acc, const float* scales, int count) {
    for (int i = 0; i < count; ++i) acc[i] *= scales[i];
    return acc;
  }
};
