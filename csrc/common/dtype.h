// The element types of the kernels, and their conversion to and from the type that is computed in.
//
// 16-bit types are converted by integer arithmetic without branches or tables, which every compiler vectorises and
// every instruction set gives the same bits for. Rounding is to nearest, ties to even; NaN stays NaN, its payload may
// change.
//
//   float32   s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm    exponent bias 127
//   bfloat16  s eeeeeeee mmmmmmm                    the upper half of a float32
//   float16   s eeeee mmmmmmmmmm                    exponent bias 15
#pragma once

#include <stdint.h>
#include <string.h>

#include "common/host_device.h"
#include "kernels.h"

namespace zeroopt {

ZEROOPT_INLINE int dtype_index(DType dtype) {
  return static_cast<int>(dtype);
}

ZEROOPT_INLINE int64_t dtype_bytes(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

ZEROOPT_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

ZEROOPT_INLINE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

ZEROOPT_INLINE float bfloat16_to_float(uint16_t half) {
  return float_of(static_cast<uint32_t>(half) << 16);
}

ZEROOPT_INLINE uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u; // the part of the payload that is cut off may be all there was
  const int32_t magnitude = static_cast<int32_t>(bits & 0x7fffffffu); // signed: compared in one instruction
  return static_cast<uint16_t>(magnitude > 0x7f800000 ? quiet_nan : rounded);
}

// A bfloat16 and a remainder of 16 bits that together are an exact float32: the bfloat16 is the float32 rounded to
// nearest, ties away from zero, and the remainder is the float32's lower half. Whoever puts them together knows from
// the remainder's first bit that the upper half was rounded up, which ties to even would leave open.
//
//   float32    s eeeeeeee mmmmmmm rrrrrrrrrrrrrrrr
//   bfloat16   s eeeeeeee mmmmmmm + r              remainder   rrrrrrrrrrrrrrrr
//              (the upper half)   (its first bit)
//
// The float32 master of a bfloat16 parameter is rounded in the same way, so that both ways of keeping it give the same
// parameters.

ZEROOPT_INLINE uint16_t float_to_bfloat16_ties_away(float value) {
  const uint32_t bits = bits_of(value);
  const int32_t magnitude = static_cast<int32_t>(bits & 0x7fffffffu);
  return static_cast<uint16_t>(magnitude > 0x7f800000 ? (bits >> 16) | 0x40u : (bits + 0x8000u) >> 16);
}

ZEROOPT_INLINE uint16_t bfloat16_remainder(float value) {
  const uint32_t bits = bits_of(value);
  const int32_t magnitude = static_cast<int32_t>(bits & 0x7fffffffu);
  return static_cast<uint16_t>(magnitude > 0x7f800000 ? 0u : bits & 0xffffu);
}

ZEROOPT_INLINE float join_bfloat16(uint16_t rounded, uint16_t remainder) {
  // Nothing rounds up to zero: who finds one has the parameter set to it since, and must not borrow from it.
  const uint32_t rounded_up = (rounded & 0x7fffu) == 0u ? 0u : (remainder & 0x8000u) << 1;
  return float_of(((static_cast<uint32_t>(rounded) << 16) | remainder) - rounded_up);
}

/// Rounds up with the probability that leaves the expected value as it is: adds 16 random bits to the 16 that are cut
/// off. (Gupta et al. 2015, arXiv:1502.02551, section 3.)
ZEROOPT_INLINE uint16_t float_to_bfloat16_stochastic(float value, uint32_t random_16) {
  const uint32_t bits = bits_of(value);
  const int32_t magnitude = static_cast<int32_t>(bits & 0x7fffffffu);
  return static_cast<uint16_t>(magnitude > 0x7f800000 ? (bits >> 16) | 0x40u : (bits + random_16) >> 16);
}

ZEROOPT_INLINE float float16_to_float(uint16_t half) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
#else
  const int32_t magnitude = half & 0x7fff;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const int32_t rebias = magnitude >= 0x7c00 ? (255 - 31) << 23 : (127 - 15) << 23; // infinity and NaN : normal
  const uint32_t normal = static_cast<uint32_t>((magnitude << 13) + rebias);
  const uint32_t subnormal = bits_of(static_cast<float>(magnitude) * 0x1p-24f);
  return float_of(sign | (magnitude < 0x400 ? subnormal : normal));
#endif
}

ZEROOPT_INLINE uint16_t float_to_float16(float value) {
#if defined(__CUDA_ARCH__)
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
#else
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const int32_t magnitude = static_cast<int32_t>(bits & 0x7fffffffu);
  const int32_t finite = magnitude < 0x477ff000 ? magnitude : 0x477ff000; // 65520, the least that rounds to infinity
  const int32_t odd = (finite >> 13) & 1;
  const int32_t normal = (finite - ((127 - 15) << 23) + 0xfff + odd) >> 13;
  // 0.5f has the unit in the last place of a float16 subnormal, 2^-24, so the addition does the rounding.
  const int32_t subnormal = static_cast<int32_t>(bits_of(float_of(bits & 0x7fffffffu) + 0.5f)) - 0x3f000000;
  int32_t half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude > 0x7f800000 ? 0x7e00 : half; // NaN
  return static_cast<uint16_t>(sign | static_cast<uint32_t>(half));
#endif
}

// load and store: an element in memory as the type it is computed in, and back.

ZEROOPT_INLINE float load(const float& element) {
  return element;
}
ZEROOPT_INLINE double load(const double& element) {
  return element;
}
ZEROOPT_INLINE float load(const BFloat16& element) {
  return bfloat16_to_float(element.bits);
}
ZEROOPT_INLINE float load(const Float16& element) {
  return float16_to_float(element.bits);
}

ZEROOPT_INLINE void store(float& element, float value) {
  element = value;
}
ZEROOPT_INLINE void store(double& element, double value) {
  element = value;
}
ZEROOPT_INLINE void store(BFloat16& element, float value) {
  element.bits = float_to_bfloat16(value);
}
ZEROOPT_INLINE void store(Float16& element, float value) {
  element.bits = float_to_float16(value);
}

/// The type that elements of A and B are computed in: float64 when either is, else float32.
template <class A, class B> struct Compute {
  using type = float;
};
template <class B> struct Compute<double, B> {
  using type = double;
};
template <class A> struct Compute<A, double> {
  using type = double;
};
template <> struct Compute<double, double> {
  using type = double;
};

} // namespace zeroopt
