// encode_slices and sum_encoded: arrays as 8- or 4-bit codes with a step a block, and the sum of several, as a binary
// tree. See common/wire_code.h.
#include "cpu/leaf/table.h"

#include "common/wire_code.h"

namespace zeroopt::cpu::ZEROOPT_ISA {
namespace {

constexpr int kLevels = 40; // partial sums that can wait: enough for any number of slices

/// exact[i] = values[i] + residual[i], and 0 behind numel.
template <class Value>
ZEROOPT_INLINE void load_block(const Value* values, const BFloat16* residual, int64_t numel, float* exact) {
  if (residual == nullptr) {
    ZEROOPT_VECTORIZE
    for (int64_t i = 0; i < numel; ++i)
      exact[i] = load(values[i]);
  } else {
    ZEROOPT_VECTORIZE
    for (int64_t i = 0; i < numel; ++i)
      exact[i] = load(values[i]) + load(residual[i]);
  }
  for (int64_t i = numel; i < kQuantBlock; ++i)
    exact[i] = 0.0f;
}

ZEROOPT_INLINE int32_t largest_magnitude(const float* exact) {
  int32_t largest = 0;
  ZEROOPT_VECTORIZE
  for (int64_t i = 0; i < kQuantBlock; ++i) {
    const int32_t magnitude = magnitude_of(exact[i]);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

template <int bits> ZEROOPT_INLINE void store_codes(const int32_t* codes, uint8_t* bytes) {
  constexpr int64_t half = kQuantBlock / 2;
  if constexpr (bits == 8) {
    ZEROOPT_VECTORIZE
    for (int64_t i = 0; i < kQuantBlock; ++i)
      bytes[i] = static_cast<uint8_t>(codes[i]);
  } else {
    ZEROOPT_VECTORIZE
    for (int64_t i = 0; i < half; ++i)
      bytes[i] = wire_join_codes(codes[i], codes[i + half]);
  }
}

// In loops of their own, for one over elements of 1, 2 and 4 bytes at once is slow.
template <int bits, class Value>
ZEROOPT_INLINE void encode_block(const Value* values, BFloat16* residual, int64_t numel, uint8_t* bytes, float* step,
                                 const uint16_t* random) {
  alignas(64) float exact[kQuantBlock];
  alignas(64) float dither[kQuantBlock];
  alignas(64) int32_t codes[kQuantBlock];
  load_block(values, residual, numel, exact);
  const WireStep s = wire_step<bits>(largest_magnitude(exact));
  *step = s.step;
  ZEROOPT_VECTORIZE
  for (int64_t i = 0; i < kQuantBlock; ++i)
    dither[i] = int8_dither(random[i]);
  ZEROOPT_VECTORIZE
  for (int64_t i = 0; i < kQuantBlock; ++i)
    codes[i] = wire_encode<bits>(s, exact[i], dither[i]);
  store_codes<bits>(codes, bytes);
  if (residual == nullptr || s.step != s.step) return;
  ZEROOPT_VECTORIZE
  for (int64_t i = 0; i < numel; ++i)
    store(residual[i], exact[i] - wire_decode(s.step, codes[i]));
}

template <int bits, class Value>
void encode(const void* values, uint16_t* residual, int64_t numel, uint8_t* bytes, float* steps, const NoiseKey& key,
            uint64_t first_call) {
  const Value* const from = static_cast<const Value*>(values);
  BFloat16* const left = reinterpret_cast<BFloat16*>(residual);
  alignas(64) uint64_t random[kQuantBlock / 4];
  for (int64_t i = 0; i < numel; i += kQuantBlock) {
    format_table.draw_noise(key, first_call + static_cast<uint64_t>(i / kNoisePerCall), kCallsPerBlock, random);
    uint8_t* const to = bytes + i / kQuantBlock * wire_block_bytes(bits);
    float* const step = steps + i / kQuantBlock;
    const uint16_t* const noise = reinterpret_cast<const uint16_t*>(random); // the lowest bits come first
    if (i + kQuantBlock <= numel)                                            // a loop of known length is the faster one
      encode_block<bits>(from + i, left == nullptr ? nullptr : left + i, kQuantBlock, to, step, noise);
    else
      encode_block<bits>(from + i, left == nullptr ? nullptr : left + i, numel - i, to, step, noise);
  }
}

/// sums[i] = the values of a block, or what there is and they.
template <int bits, bool adds> ZEROOPT_INLINE void decode_block(const uint8_t* bytes, float step, float* sums) {
  constexpr int64_t half = kQuantBlock / 2;
  if constexpr (bits == 8) {
    ZEROOPT_VECTORIZE
    for (int64_t i = 0; i < kQuantBlock; ++i) {
      const float value = wire_decode(step, static_cast<int8_t>(bytes[i]));
      sums[i] = adds ? sums[i] + value : value;
    }
  } else {
    ZEROOPT_VECTORIZE
    for (int64_t i = 0; i < half; ++i) {
      const float value = wire_decode(step, wire_lower_code(bytes[i]));
      sums[i] = adds ? sums[i] + value : value;
    }
    ZEROOPT_VECTORIZE
    for (int64_t i = 0; i < half; ++i) {
      const float value = wire_decode(step, wire_upper_code(bytes[i]));
      sums[i + half] = adds ? sums[i + half] + value : value;
    }
  }
}

ZEROOPT_INLINE void add_block(float* sums, const float* others) {
  ZEROOPT_VECTORIZE
  for (int64_t i = 0; i < kQuantBlock; ++i)
    sums[i] += others[i];
}

/// The tree over one block of all slices, in waiting[0]: partial sums wait as a binary counter carries.
template <int bits>
ZEROOPT_INLINE void sum_block(const uint8_t* const* slices, int64_t num_slices, int64_t blocks, int64_t block,
                              float (*waiting)[kQuantBlock]) {
  int64_t count = 0; // of those that wait
  for (int64_t s = 0; s < num_slices; ++s) {
    const uint8_t* const bytes = slices[s] + block * wire_block_bytes(bits);
    const float step = reinterpret_cast<const float*>(slices[s] + blocks * wire_block_bytes(bits))[block];
    if ((s & 1) == 0) {
      decode_block<bits, false>(bytes, step, waiting[count++]);
      continue;
    }
    decode_block<bits, true>(bytes, step, waiting[count - 1]);
    for (int64_t carry = s >> 1; carry & 1; carry >>= 1) {
      --count;
      add_block(waiting[count - 1], waiting[count]);
    }
  }
  for (; count > 1; --count)
    add_block(waiting[count - 2], waiting[count - 1]);
}

template <class Out> ZEROOPT_INLINE void store_block(const float* sums, const Out* base, Out* out, int64_t numel) {
  if (base == nullptr) {
    ZEROOPT_VECTORIZE
    for (int64_t i = 0; i < numel; ++i)
      store(out[i], sums[i]);
  } else {
    ZEROOPT_VECTORIZE
    for (int64_t i = 0; i < numel; ++i)
      store(out[i], load(base[i]) + sums[i]);
  }
}

template <int bits, class Out>
void sum(const uint8_t* const* slices, int64_t num_slices, const void* base, void* out, int64_t numel, int64_t first,
         int64_t last) {
  alignas(64) float waiting[kLevels][kQuantBlock];
  const int64_t blocks = num_quant_blocks(numel);
  for (int64_t block = first; block < last; ++block) {
    sum_block<bits>(slices, num_slices, blocks, block, waiting);
    const int64_t i = block * kQuantBlock;
    const Out* const from = base == nullptr ? nullptr : static_cast<const Out*>(base) + i;
    Out* const to = static_cast<Out*>(out) + i;
    if (i + kQuantBlock <= numel)
      store_block(waiting[0], from, to, kQuantBlock);
    else
      store_block(waiting[0], from, to, numel - i);
  }
}

} // namespace

const WireTable wire_table = {
    {
        {encode<4, float>, encode<8, float>},
        {nullptr, nullptr},
        {encode<4, BFloat16>, encode<8, BFloat16>},
        {encode<4, Float16>, encode<8, Float16>},
    },
    {
        {sum<4, float>, sum<8, float>},
        {nullptr, nullptr},
        {sum<4, BFloat16>, sum<8, BFloat16>},
        {sum<4, Float16>, sum<8, Float16>},
    },
};

} // namespace zeroopt::cpu::ZEROOPT_ISA
