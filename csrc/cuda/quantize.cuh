// quantize and dequantize: float32 values as 8-bit codes with a scale a block, and back. bytes: 5 and 4 / kQuantBlock.
#pragma once

#include "cuda/int8_lane.cuh"

namespace zeroopt::cuda {

/// Calls body(block, lane) for the blocks of this warp, with all its lanes together.
template <class Body>
ZEROOPT_DEVICE void for_each_quant_block(const float* values, const uint8_t* codes, int64_t numel, const Body& body) {
  const bool aligned = reinterpret_cast<uintptr_t>(values) % alignof(Vector<float, kLaneNumel>) == 0 &&
                       reinterpret_cast<uintptr_t>(codes) % alignof(Vector<uint8_t, kLaneNumel>) == 0;
  const int64_t blocks = (numel + kQuantBlock - 1) / kQuantBlock;
  for (int64_t block = warp_index(); block < blocks; block += num_warps())
    body(block, LaneRange::of(block * kQuantBlock, lane_index(), numel, aligned));
}

template <bool is_signed>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const float* values, uint8_t* codes, float* scales, int64_t numel) {
  for_each_quant_block(values, codes, numel, [&](int64_t block, const LaneRange& lane) {
    float items[kLaneNumel];
    load_lane(values, lane, items);
    if (is_signed)
      store_signed_codes(items, lane, codes, scales + block);
    else
      store_unsigned_codes(items, lane, codes, scales + block, [](int) { return 0.0f; });
  });
}

template <bool is_signed>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const uint8_t* codes, const float* scales, float* values, int64_t numel) {
  for_each_quant_block(values, codes, numel, [&](int64_t block, const LaneRange& lane) {
    float items[kLaneNumel];
    load_codes(codes, scales + block, is_signed, lane, items);
    store_lane(values, lane, items);
  });
}

} // namespace zeroopt::cuda
