// encode_slices and sum_encoded: arrays as 8- or 4-bit codes with a step a block, and the sum of several, as a binary
// tree. See common/wire_code.h. A warp takes a block. bytes: as in kernels.h.
#pragma once

#include "common/wire_code.h"
#include "cuda/formats.cuh"
#include "cuda/reduce.cuh"

namespace zeroopt::cuda {

constexpr int kHalfWarp = kWarp / 2;

/// All elements of lane `place` of a block of codes: they travel in whole blocks, which are aligned.
ZEROOPT_DEVICE LaneRange lane_of_codes(int place) {
  return {place * kLaneNumel, 0, kLaneNumel, true};
}

/// The codes of the warp's block. In 4 bits, each lane of the lower half stores its own and those of one of the upper.
template <int bits>
ZEROOPT_DEVICE void store_wire_codes(const int32_t (&codes)[kLaneNumel], int lane, uint8_t* block_bytes) {
  uint8_t bytes[kLaneNumel];
  if constexpr (bits == 8) {
#pragma unroll
    for (int k = 0; k < kLaneNumel; ++k)
      bytes[k] = static_cast<uint8_t>(codes[k]);
    store_lane(block_bytes, lane_of_codes(lane), bytes);
  } else {
    uint32_t packed = 0;
#pragma unroll
    for (int k = 0; k < kLaneNumel; ++k)
      packed |= (static_cast<uint32_t>(codes[k]) & 15u) << 4 * k;
    const uint32_t other = __shfl_xor_sync(kAllLanes, packed, kHalfWarp);
    if (lane >= kHalfWarp) return;
#pragma unroll
    for (int k = 0; k < kLaneNumel; ++k)
      bytes[k] = static_cast<uint8_t>((packed >> 4 * k & 15u) | (other >> 4 * k & 15u) << 4);
    store_lane(block_bytes, lane_of_codes(lane), bytes);
  }
}

/// The values of this lane's elements of a block.
template <int bits>
ZEROOPT_DEVICE void load_wire_codes(const uint8_t* block_bytes, float step, int lane, float (&values)[kLaneNumel]) {
  const int place = bits == 8 ? lane : lane % kHalfWarp;
  uint8_t bytes[kLaneNumel];
  load_lane(block_bytes, lane_of_codes(place), bytes);
#pragma unroll
  for (int k = 0; k < kLaneNumel; ++k) {
    const int32_t code = bits == 8          ? static_cast<int8_t>(bytes[k])
                         : lane < kHalfWarp ? wire_lower_code(bytes[k])
                                            : wire_upper_code(bytes[k]);
    values[k] = wire_decode(step, code);
  }
}

/// One block of a slice.
/// @param first_call of the block's random numbers
template <int bits, class Value>
ZEROOPT_DEVICE void encode_block(const Value* values, uint16_t* residual, const LaneRange& lane, uint8_t* block_bytes,
                                 float* step, const NoiseKey& key, uint64_t first_call) {
  float exact[kLaneNumel];
  load_as<Value>(values, lane, exact);
  if (residual != nullptr) {
    float left[kLaneNumel];
    load_as<BFloat16>(residual, lane, left);
#pragma unroll
    for (int k = 0; k < kLaneNumel; ++k)
      exact[k] += left[k];
  }
  const WireStep s = wire_step<bits>(largest_by(exact, lane, [](float value) { return magnitude_of(value); }));
  if (lane_index() == 0) *step = s.step;
  const LaneNoise random = join_words(noise<uint32_t>(key, first_call + static_cast<uint64_t>(lane_index())));
  int32_t codes[kLaneNumel];
#pragma unroll
  for (int k = 0; k < kLaneNumel; ++k)
    codes[k] = wire_encode<bits>(s, exact[k], int8_dither(noise_of(random, k)));
  store_wire_codes<bits>(codes, lane_index(), block_bytes);
  if (residual == nullptr || s.step != s.step) return;
#pragma unroll
  for (int k = 0; k < kLaneNumel; ++k)
    exact[k] -= wire_decode(s.step, codes[k]);
  store_as<BFloat16>(exact, lane, residual);
}

template <int bits, class Value>
__global__ void __launch_bounds__(kThreads) encode_kernel(const Value* values, uint16_t* residual, uint8_t* encoded,
                                                          int64_t slice_numel, int64_t num_slices, NoiseKey key) {
  const int64_t blocks = num_quant_blocks(slice_numel), slice_bytes = wire_bytes(slice_numel, bits);
  const int64_t steps_at = blocks * wire_block_bytes(bits);
  const int64_t zeros_at = steps_at + blocks * static_cast<int64_t>(sizeof(float));
  for (int64_t i = warp_index(); i < blocks * num_slices; i += num_warps()) {
    const int64_t slice = i / blocks, block = i % blocks;
    const Value* const from = values + slice * slice_numel;
    uint16_t* const left = residual == nullptr ? nullptr : residual + slice * slice_numel;
    const bool aligned = reinterpret_cast<uintptr_t>(from) % alignof(Vector<Value, kLaneNumel>) == 0 &&
                         reinterpret_cast<uintptr_t>(left) % alignof(Vector<uint16_t, kLaneNumel>) == 0;
    const LaneRange lane = LaneRange::of(block * kQuantBlock, lane_index(), slice_numel, aligned);
    uint8_t* const bytes = encoded + slice * slice_bytes;
    encode_block<bits>(from, left, lane, bytes + block * wire_block_bytes(bits),
                       reinterpret_cast<float*>(bytes + steps_at) + block, key,
                       static_cast<uint64_t>(i * kCallsPerBlock));
    if (block == blocks - 1 && zeros_at + lane_index() < slice_bytes) bytes[zeros_at + lane_index()] = 0;
  }
}

/// The values of this lane's elements of one block of a slice.
template <int bits>
ZEROOPT_DEVICE void load_wire_block(const uint8_t* address, int64_t block, int64_t steps_at,
                                    float (&values)[kLaneNumel]) {
  const uint8_t* const slice = in_global(address);
  const float step = reinterpret_cast<const float*>(slice + steps_at)[block];
  load_wire_codes<bits>(slice + block * wire_block_bytes(bits), step, lane_index(), values);
}

/// The sum of the first `width` slices, or of all where there are fewer, in registers, as sum_group has it.
template <int bits, int width>
ZEROOPT_DEVICE void sum_wire_group(const uint8_t* const* slices, int64_t num_slices, int64_t block, int64_t steps_at,
                                   float (&sum)[kLaneNumel]) {
  if constexpr (width == 1) {
    load_wire_block<bits>(slices[0], block, steps_at, sum);
  } else {
    constexpr int half = width / 2;
    sum_wire_group<bits, half>(slices, num_slices, block, steps_at, sum);
    if (num_slices <= half) return;
    float right[kLaneNumel];
    sum_wire_group<bits, half>(slices + half, num_slices - half, block, steps_at, right);
    add_values(sum, right);
  }
}

/// The sum of up to kMaxReduceSlices slices, as sum_groups has it.
template <int bits>
ZEROOPT_DEVICE void sum_wire_groups(const uint8_t* const* slices, int64_t num_slices, int64_t block, int64_t steps_at,
                                    float (&sum)[kLaneNumel]) {
  float waiting[kLevels][kLaneNumel];
  int level = 0;
  for (int64_t group = 0; num_slices > kGroup; ++group) {
    sum_wire_group<bits, kGroup>(slices, kGroup, block, steps_at, sum);
    for (int64_t carry = group; carry & 1; carry >>= 1)
      add_values(sum, waiting[--level]);
#pragma unroll
    for (int k = 0; k < kLaneNumel; ++k)
      waiting[level][k] = sum[k];
    ++level;
    slices += kGroup;
    num_slices -= kGroup;
  }
  sum_wire_group<bits, kGroup>(slices, num_slices, block, steps_at, sum);
  while (level > 0)
    add_values(sum, waiting[--level]);
}

/// out may be base.
/// capacity: kGroup or kMaxReduceSlices. With the former the kernel takes no local memory.
template <int bits, class Out, int capacity>
__global__ void __launch_bounds__(kThreads)
    sum_encoded_kernel(const __grid_constant__ SliceList<uint8_t, capacity> list, int64_t num_slices, const Out* base,
                       Out* out, int64_t numel) {
  const int64_t blocks = num_quant_blocks(numel), steps_at = blocks * wire_block_bytes(bits);
  const bool aligned = reinterpret_cast<uintptr_t>(out) % alignof(Vector<Out, kLaneNumel>) == 0 &&
                       reinterpret_cast<uintptr_t>(base) % alignof(Vector<Out, kLaneNumel>) == 0;
  for (int64_t block = warp_index(); block < blocks; block += num_warps()) {
    float sum[kLaneNumel];
    if constexpr (capacity > kGroup)
      sum_wire_groups<bits>(list.items, num_slices, block, steps_at, sum);
    else
      sum_wire_group<bits, kGroup>(list.items, num_slices, block, steps_at, sum);
    const LaneRange lane = LaneRange::of(block * kQuantBlock, lane_index(), numel, aligned);
    if (base != nullptr) {
      float start[kLaneNumel];
      load_as<Out>(base, lane, start);
      add_values(sum, start);
    }
    store_as<Out>(sum, lane, out);
  }
}

} // namespace zeroopt::cuda
