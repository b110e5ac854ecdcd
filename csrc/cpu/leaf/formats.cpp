// How parameters and moments are stored: the formats of common/dtype.h and common/int8_code.h, a block at a time.
#include "cpu/leaf/table.h"

#include "common/dtype.h"
#include "common/int8_code.h"

namespace zeroopt::cpu::ZEROOPT_ISA {
namespace {

void draw_noise(const NoiseKey& noise_key, uint64_t first_call, int64_t calls, uint64_t* bits) {
  const NoiseKey key = noise_key;
  ZEROOPT_VECTORIZE
  for (int64_t i = 0; i < calls; ++i) {
    const PhiloxWords<uint64_t> drawn = noise<uint64_t>(key, first_call + static_cast<uint64_t>(i));
    bits[2 * i] = (drawn.word[0] & 0xffffffffu) | drawn.word[1] << 32;
    bits[2 * i + 1] = (drawn.word[2] & 0xffffffffu) | drawn.word[3] << 32;
  }
}

void round_ties_away(const float* values, uint16_t* rounded, int64_t numel) {
  ZEROOPT_VECTORIZE
  for (int64_t i = 0; i < numel; ++i)
    rounded[i] = float_to_bfloat16_ties_away(values[i]);
}

void round_stochastic(const float* values, const uint16_t* random, uint16_t* rounded, int64_t numel) {
  ZEROOPT_VECTORIZE
  for (int64_t i = 0; i < numel; ++i)
    rounded[i] = float_to_bfloat16_stochastic(values[i], random[i]);
}

void split(const float* values, uint16_t* rounded, uint16_t* remainders, int64_t numel) {
  ZEROOPT_VECTORIZE
  for (int64_t i = 0; i < numel; ++i) {
    rounded[i] = float_to_bfloat16_ties_away(values[i]);
    remainders[i] = bfloat16_remainder(values[i]);
  }
}

void join(const uint16_t* rounded, const uint16_t* remainders, float* values, int64_t numel) {
  ZEROOPT_VECTORIZE
  for (int64_t i = 0; i < numel; ++i)
    values[i] = join_bfloat16(rounded[i], remainders[i]);
}

template <bool is_signed> ZEROOPT_INLINE Int8Scale scale_of(const float* values, int64_t numel) {
  int32_t largest = 0;
  ZEROOPT_VECTORIZE
  for (int64_t i = 0; i < numel; ++i) {
    const int32_t magnitude = magnitude_of(values[i]);
    largest = magnitude > largest ? magnitude : largest;
  }
  if (largest < kInfiniteMagnitude) return int8_scale<is_signed>(largest);
  largest = 0;
  for (int64_t i = 0; i < numel; ++i) {
    const int32_t magnitude = finite_magnitude_of(values[i]);
    largest = magnitude > largest ? magnitude : largest;
  }
  return int8_marked_scale<is_signed>(largest);
}

template <bool is_signed> ZEROOPT_INLINE void mark_block(const float* values, uint8_t* codes, int64_t numel) {
  for (int64_t i = 0; i < numel; ++i)
    codes[i] = int8_mark<is_signed>(values[i], codes[i]);
}

ZEROOPT_INLINE void encode_signed_block(const float* values, uint8_t* codes, float* scale, int64_t numel) {
  const Int8Scale s = scale_of<true>(values, numel);
  *scale = s.scale;
  ZEROOPT_VECTORIZE
  for (int64_t i = 0; i < numel; ++i)
    codes[i] = int8_encode_signed(s, values[i]);
  if (int8_is_marked(s.scale)) mark_block<true>(values, codes, numel);
}

ZEROOPT_INLINE void encode_unsigned_block(const float* values, const uint16_t* random, uint8_t* codes, float* scale,
                                          int64_t numel) {
  const Int8Scale s = scale_of<false>(values, numel);
  *scale = s.scale;
  if (random == nullptr) {
    ZEROOPT_VECTORIZE
    for (int64_t i = 0; i < numel; ++i)
      codes[i] = int8_encode_unsigned(s, values[i], 0.0f);
  } else {
    // Apart, for a loop over elements of 1, 2 and 4 bytes at once is slow.
    alignas(64) float dither[kQuantBlock];
    ZEROOPT_VECTORIZE
    for (int64_t i = 0; i < numel; ++i)
      dither[i] = int8_dither(random[i]);
    ZEROOPT_VECTORIZE
    for (int64_t i = 0; i < numel; ++i)
      codes[i] = int8_encode_unsigned(s, values[i], dither[i]);
  }
  if (int8_is_marked(s.scale)) mark_block<false>(values, codes, numel);
}

template <bool is_signed>
ZEROOPT_INLINE void decode_block(const uint8_t* codes, float scale, float* values, int64_t numel) {
  const float magnitude = fabsf(scale);
  ZEROOPT_VECTORIZE
  for (int64_t i = 0; i < numel; ++i)
    values[i] = int8_decode<is_signed>(magnitude, codes[i]);
  if (!int8_is_marked(scale)) return;
  for (int64_t i = 0; i < numel; ++i)
    values[i] = int8_unmark<is_signed>(values[i], codes[i]);
}

// Whole blocks apart from the last one: a loop of known length is the faster one.

void encode_signed(const float* values, uint8_t* codes, float* scales, int64_t numel) {
  int64_t i = 0;
  for (; i + kQuantBlock <= numel; i += kQuantBlock)
    encode_signed_block(values + i, codes + i, scales + i / kQuantBlock, kQuantBlock);
  if (i < numel) encode_signed_block(values + i, codes + i, scales + i / kQuantBlock, numel - i);
}

void encode_unsigned(const float* values, const uint16_t* random, uint8_t* codes, float* scales, int64_t numel) {
  int64_t i = 0;
  for (; i + kQuantBlock <= numel; i += kQuantBlock)
    encode_unsigned_block(values + i, random == nullptr ? nullptr : random + i, codes + i, scales + i / kQuantBlock,
                          kQuantBlock);
  if (i < numel)
    encode_unsigned_block(values + i, random == nullptr ? nullptr : random + i, codes + i, scales + i / kQuantBlock,
                          numel - i);
}

template <bool is_signed> void decode(const uint8_t* codes, const float* scales, float* values, int64_t numel) {
  int64_t i = 0;
  for (; i + kQuantBlock <= numel; i += kQuantBlock)
    decode_block<is_signed>(codes + i, scales[i / kQuantBlock], values + i, kQuantBlock);
  if (i < numel) decode_block<is_signed>(codes + i, scales[i / kQuantBlock], values + i, numel - i);
}

} // namespace

const FormatTable format_table = {
    draw_noise, round_ties_away, round_stochastic, split,
    join,       encode_signed,   encode_unsigned,  {decode<false>, decode<true>},
};

} // namespace zeroopt::cpu::ZEROOPT_ISA
