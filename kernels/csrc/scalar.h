// One value at a time, for plain loops that the compiler vectorises: conversions and exp. Multiply
// and add round separately (the build sets -ffp-contract=off): the same bits on every machine.
#pragma once

#include <cstdint>
#include <cstring>

// The plain loops are compiled for several machines and chosen when the library is loaded.
#if defined(__x86_64__) && defined(__GNUC__)
#define REMORA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define REMORA_CLONES
#endif

namespace remora {

inline float widen(float value) { return value; }
inline float widen(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
inline void narrow(float value, float* target) { *target = value; }
inline void narrow(float value, uint16_t* target) {  // to nearest even; a NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  *target = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

// exp(x) within 2 units in the last place for x in [-87, 88]; Cephes' polynomial.
inline float exponential(float x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504088896341f + shift;
  const float n = shifted - shift;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  const uint32_t exponent = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &exponent, sizeof scale);
  return p * scale;
}

}  // namespace remora
