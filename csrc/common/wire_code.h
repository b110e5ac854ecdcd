// Arrays as they travel between ranks: kQuantBlock elements share a step, and each of them is a whole number of steps,
// in 8 bits or in 4 (block-wise symmetric codes, as ZeRO++ sends gradients: Wang et al. 2023, arXiv:2306.10209).
//
//   step = the block's largest magnitude / most      most = 127 or 7
//   code = floor(value / step + u)                   u random in (0, 1), so that the expected code is value / step
//
// A slice of an array, in bytes:
//
//   codes [blocks][kQuantBlock * bits / 8]  |  steps float32[blocks]  |  zeros, to a multiple of kWireAlignment
//
// In 4 bits, byte k of a block holds element k in its lower half and element k + kQuantBlock / 2 in its upper half.
// What a slice lacks of its last block travels as zeros.
//
// Blocks of 256, as those of 8-bit moments: a step for each makes codes 1.6 % larger in 8 bits and 3.1 % in 4, a warp
// finds the largest of one without leaving its registers, and rows of a weight, whose gradients differ in magnitude,
// are mostly longer.
//
// Where a block holds what is not finite, its step is NaN, and so is all that comes out: whoever looks for an overflow
// finds it.
#pragma once

#include "common/int8_code.h"
#include "common/philox.h"

namespace zeroopt {

constexpr int64_t kWireAlignment = 16; // bytes, of slices that travel
constexpr uint32_t kWireNoise = 15;    // among the arrays of common/philox.h
constexpr int64_t kCallsPerBlock = kQuantBlock / kNoisePerCall;

ZEROOPT_INLINE constexpr int64_t num_quant_blocks(int64_t numel) {
  return (numel + kQuantBlock - 1) / kQuantBlock;
}

/// Of the codes of a block.
ZEROOPT_INLINE constexpr int64_t wire_block_bytes(int bits) {
  return kQuantBlock * bits / 8;
}

/// Of a slice.
ZEROOPT_INLINE constexpr int64_t wire_bytes(int64_t numel, int bits) {
  const int64_t blocks = num_quant_blocks(numel);
  const int64_t bytes = blocks * (wire_block_bytes(bits) + static_cast<int64_t>(sizeof(float)));
  return (bytes + kWireAlignment - 1) / kWireAlignment * kWireAlignment;
}

/// A block's step and what codes are computed with.
struct WireStep {
  float step;    ///< stored; 0 where all that there is is too small, NaN where something is not finite
  float inverse; ///< 1 / step, or 0
  int32_t mask;  ///< of the codes: 0 where there is no step
};

template <int bits> ZEROOPT_INLINE WireStep wire_step(int32_t largest_magnitude) {
  constexpr int32_t too_small = 0x04800000; // 2^-118, whose step is no subnormal yet
  constexpr float most = bits == 8 ? 127.0f : 7.0f;
  if (largest_magnitude >= kInfiniteMagnitude) return {float_of(0x7fc00000u), 0.0f, 0};
  if (largest_magnitude < too_small) return {0.0f, 0.0f, 0};
  const float largest = float_of(static_cast<uint32_t>(largest_magnitude));
  return {largest / most, most / largest, -1};
}

/// @param dither -0.5 to 0.5, which makes rounding to nearest stochastic: int8_dither
template <int bits> ZEROOPT_INLINE int32_t wire_encode(const WireStep& s, float value, float dither) {
  constexpr int32_t most = bits == 8 ? 127 : 7;
  constexpr int32_t zero = 0x4b400000; // the bits of kRoundToInteger, whose lowest count integers
  const float rounded = value * s.inverse + dither + kRoundToInteger;
  int32_t code = static_cast<int32_t>(bits_of(rounded)) - zero;
  code = code < most ? code : most;
  code = code > -most ? code : -most;
  return code & s.mask;
}

ZEROOPT_INLINE float wire_decode(float step, int32_t code) {
  return static_cast<float>(code) * step;
}

/// The code in the lower or the upper half of a byte.
ZEROOPT_INLINE int32_t wire_lower_code(uint8_t byte) {
  return static_cast<int32_t>((byte & 15u) ^ 8u) - 8;
}
ZEROOPT_INLINE int32_t wire_upper_code(uint8_t byte) {
  return static_cast<int32_t>((byte >> 4) ^ 8u) - 8;
}
ZEROOPT_INLINE uint8_t wire_join_codes(int32_t lower, int32_t upper) {
  return static_cast<uint8_t>((lower & 15) | (upper & 15) << 4);
}

} // namespace zeroopt
