// Moments in 8 bits: blocks of kQuantBlock elements share a scale, the largest magnitude among them, and each element
// is a code for its share of the scale (block-wise quantisation: Dettmers et al. 2022, arXiv:2110.02861). Moments crowd
// near zero, so shares are bent before they are rounded to equal steps, which makes the steps finest there; the curves
// are those of FlashOptim (Gonzalez Ortiz et al. 2026, arXiv:2602.23349, algorithms 2 and 3), which need no table:
//
//   signed    x / s = a    code = round(127 * 2 a / (1 + |a|))     a = y / (2 - |y|), y = code / 127
//   unsigned  sqrt(x) / s = a    code = round(255 a)               x = (s * code / 255)^2, s = sqrt of the largest x
//
// Three things are ours. In an optimizer's step unsigned codes are rounded stochastically: a second moment decays by a
// thousandth a step, which rounding to nearest would lose each time, so that a code could never fall. A positive value
// never gets the unsigned code 0, or its square root could not be divided by. And where a block holds what is not
// finite, the outermost codes stand for that, the block's scale is that of its finite elements, of which the largest
// has the next code, and the scale's sign says so:
//
//   scale >= 0     signed    -127 … 127                           unsigned    0 … 255
//   scale is -s    signed    -128 NaN, ±127 infinity, -126 … 126  unsigned    255 NaN, 254 infinity, 0 … 253
//
// So one gradient that overflows costs its neighbours a hundredth of precision, and itself comes back as what it was.
#pragma once

#include <math.h>

#include "common/dtype.h"

namespace zeroopt {

constexpr float kRoundToInteger = 12582912.0f; // 1.5 * 2^23: what is added to it is rounded to an integer

constexpr int32_t kInfiniteMagnitude = 0x7f800000;

/// The part of a value that a block's largest is sought by: integers, in which NaN is larger than infinity.
ZEROOPT_INLINE int32_t magnitude_of(float value) {
  return static_cast<int32_t>(bits_of(value) & 0x7fffffffu);
}

/// The same, and 0 for what is not finite.
ZEROOPT_INLINE int32_t finite_magnitude_of(float value) {
  const int32_t magnitude = magnitude_of(value);
  return magnitude < kInfiniteMagnitude ? magnitude : 0;
}

/// A block's scale and what codes are computed with.
struct Int8Scale {
  float scale;   ///< stored; the largest magnitude, or its square root
  float inverse; ///< 1 / scale; 0 where that overflows
  uint32_t mask; ///< of the codes: 0 where the scale is 0
};

/// Of a block whose elements are all finite.
template <bool is_signed> ZEROOPT_INLINE Int8Scale int8_scale(int32_t largest_magnitude) {
  constexpr int32_t too_small = 0x01000000; // 2^-125, whose inverse is no subnormal yet
  const float largest = float_of(static_cast<uint32_t>(largest_magnitude));
  const bool usable = largest_magnitude >= too_small;
  const float scale = is_signed ? largest : sqrtf(largest);
  return {usable ? scale : 0.0f, usable ? 1.0f / scale : 0.0f, usable ? 0xffu : 0u};
}

/// Of a block in which others are not finite; its codes have still to go through `int8_mark`. The largest magnitude has
/// the signed code 126, for 126 / 127 is the share 63 / 64 bent, or the unsigned code 253.
template <bool is_signed> ZEROOPT_INLINE Int8Scale int8_marked_scale(int32_t largest_finite) {
  constexpr float largest_float = 0x1.fffffep127f;
  Int8Scale s = int8_scale<is_signed>(largest_finite);
  if (s.mask == 0u) return {-0.0f, 0.0f, 0u};
  const float wider = s.scale * (is_signed ? 64.0f / 63.0f : 255.0f / 253.0f);
  const float scale = wider < largest_float ? wider : largest_float;
  return {-scale, 1.0f / scale, s.mask};
}

ZEROOPT_INLINE bool int8_is_marked(float scale) {
  return bits_of(scale) >> 31 != 0u;
}

/// The code in a marked block, of a value that has been encoded with its scale.
template <bool is_signed> ZEROOPT_INLINE uint8_t int8_mark(float value, uint8_t code) {
  const int32_t magnitude = magnitude_of(value);
  if (is_signed) {
    const int32_t finite = static_cast<int8_t>(code);
    const int32_t infinity = bits_of(value) >> 31 != 0u ? -127 : 127;
    const int32_t bounded = finite < -126 ? -126 : finite > 126 ? 126 : finite;
    const int32_t marked = magnitude > kInfiniteMagnitude ? -128 : magnitude == kInfiniteMagnitude ? infinity : bounded;
    return static_cast<uint8_t>(marked);
  }
  const int32_t bounded = code > 253 ? 253 : code;
  const int32_t marked = magnitude > kInfiniteMagnitude ? 255 : magnitude == kInfiniteMagnitude ? 254 : bounded;
  return static_cast<uint8_t>(marked);
}

/// The value of a code in a marked block, whose scale without its sign has decoded it to `value`.
template <bool is_signed> ZEROOPT_INLINE float int8_unmark(float value, uint8_t code) {
  const float infinity = float_of(static_cast<uint32_t>(kInfiniteMagnitude));
  const float nan = float_of(0x7fc00000u);
  if (is_signed) {
    const int32_t marked = static_cast<int8_t>(code);
    return marked == -128 ? nan : marked == -127 ? -infinity : marked == 127 ? infinity : value;
  }
  return code == 255 ? nan : code == 254 ? infinity : value;
}

/// What is added before rounding to nearest: nothing, or as much as makes it stochastic. random_16: 16 random bits.
ZEROOPT_INLINE float int8_dither(uint32_t random_16) {
  return static_cast<float>(static_cast<int32_t>(random_16)) * 0x1p-16f - (0.5f - 0x1p-17f);
}

ZEROOPT_INLINE uint8_t int8_encode_signed(const Int8Scale& s, float value) {
  const float share = value * s.inverse;
  const float bent = 254.0f * share / (1.0f + fabsf(share));
  return static_cast<uint8_t>(bits_of(bent + kRoundToInteger) & s.mask);
}

ZEROOPT_INLINE uint8_t int8_encode_unsigned(const Int8Scale& s, float value, float dither) {
  constexpr int32_t zero = 0x4b400000; // the bits of kRoundToInteger, whose lowest count integers
  const float rounded = 255.0f * (sqrtf(value) * s.inverse) + dither + kRoundToInteger;
  const int32_t least = magnitude_of(value) > 0 ? zero + 1 : zero;
  int32_t code = static_cast<int32_t>(bits_of(rounded));
  code = code > least ? code : least;
  code = code < zero + 255 ? code : zero + 255;
  return static_cast<uint8_t>(static_cast<uint32_t>(code) & s.mask);
}

template <bool is_signed> ZEROOPT_INLINE float int8_decode(float scale, uint8_t code) {
  if (is_signed) {
    const float bent = static_cast<float>(static_cast<int8_t>(code)) * (1.0f / 127.0f);
    return bent / (2.0f - fabsf(bent)) * scale;
  }
  const float root = static_cast<float>(code) * (1.0f / 255.0f) * scale;
  return root * root;
}

} // namespace zeroopt
