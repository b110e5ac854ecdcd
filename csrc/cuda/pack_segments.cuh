// pack_segments: cast and scale of many arrays in one launch. bytes: sizeof(src) + sizeof(dst).
//
// Which arrays, the launch brings along among the kernel's arguments: nothing has to be copied to the device before, so
// nobody waits and a CUDA graph can capture it. The dtypes are the same for a whole launch, so they are branched on
// rather than compiled apart.
#pragma once

#include "cuda/tiles.cuh"

namespace zeroopt::cuda {

struct PackPiece {
  const void* src;
  void* dst;
  int64_t numel;
  int64_t first_tile;
  int lead;
};

constexpr int kPiecesPerLaunch = 100;

/// What one launch packs: an argument, of which there may be 4096 bytes.
struct PackBatch {
  int count;
  int64_t tiles;
  PackPiece pieces[kPiecesPerLaunch];
};

/// Calls body with an element of the dtype; float64 only where values are.
template <class Value, class Body> ZEROOPT_DEVICE void with_dtype(DType dtype, const Body& body) {
  switch (dtype) {
  case DType::float32:
    return body(float());
  case DType::float64:
    if constexpr (sizeof(Value) == sizeof(double)) body(double());
    return;
  case DType::bfloat16:
    return body(BFloat16());
  case DType::float16:
    return body(Float16());
  }
}

/// Value: what is multiplied in, float or double.
template <class Value>
__global__ void __launch_bounds__(kThreads)
    pack_segments_kernel(const __grid_constant__ PackBatch batch, DType src, DType dst, Value scale) {
  const auto first_tile = [&](int64_t i) { return batch.pieces[i].first_tile; };
  int64_t index = 0;
  for (int64_t tile = warp_index(); tile < batch.tiles; tile += num_warps()) {
    index = array_of(first_tile, index, batch.count, tile);
    const PackPiece piece = batch.pieces[index];
    const LaneRange lane = lane_range(tile - piece.first_tile, piece.numel, piece.lead);
    Value values[kLaneNumel];
    with_dtype<Value>(src, [&](auto item) { load_as<decltype(item)>(piece.src, lane, values); });
#pragma unroll
    for (int k = 0; k < kLaneNumel; ++k)
      values[k] *= scale;
    with_dtype<Value>(dst, [&](auto item) { store_as<decltype(item)>(values, lane, piece.dst); });
  }
}

} // namespace zeroopt::cuda
