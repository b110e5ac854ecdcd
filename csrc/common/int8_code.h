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
// finite, its scale is that and its codes are 0, so that all of it comes back as NaN rather than as something that
// looks right.
#pragma once

#include <math.h>

#include "common/dtype.h"

namespace zeroopt {

constexpr float kRoundToInteger = 12582912.0f; // 1.5 * 2^23: what is added to it is rounded to an integer

/// The part of a value that a block's largest is sought by: integers, in which NaN is larger than infinity.
ZEROOPT_INLINE int32_t magnitude_of(float value) {
  return static_cast<int32_t>(bits_of(value) & 0x7fffffffu);
}

/// A block's scale and what codes are computed with.
struct Int8Scale {
  float scale;   ///< stored; the largest magnitude, or its square root
  float inverse; ///< 1 / scale; 0 where that overflows or the scale is not finite
  uint32_t mask; ///< of the codes: 0 where the scale is not finite
};

template <bool is_signed> ZEROOPT_INLINE Int8Scale int8_scale(int32_t largest_magnitude) {
  constexpr int32_t infinity = 0x7f800000;
  constexpr int32_t too_small = 0x01000000; // 2^-125, whose inverse is no subnormal yet
  const float largest = float_of(static_cast<uint32_t>(largest_magnitude));
  const bool usable = largest_magnitude >= too_small && largest_magnitude < infinity;
  const float scale = is_signed ? largest : sqrtf(largest);
  return {largest_magnitude < too_small ? 0.0f : scale, usable ? 1.0f / scale : 0.0f, usable ? 0xffu : 0u};
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
