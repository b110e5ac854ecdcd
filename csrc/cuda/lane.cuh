// Work by warps: a warp takes a tile of 256 elements, each lane 8 of them in a row.
//
// 8 elements are 16 bytes of a 16-bit type and one call of random numbers, and the 256 are the block that shares the
// scale of 8-bit codes, so that its largest magnitude is found without leaving the warp.
#pragma once

#include "common/dtype.h"
#include "common/philox.h"
#include "cuda/vector.cuh"
#include "kernels.h"

namespace zeroopt::cuda {

constexpr int kWarp = 32;     // lanes
constexpr int kLaneNumel = 8; // elements
constexpr int kTile = kWarp * kLaneNumel;
constexpr int kWarpsPerBlock = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;
static_assert(kTile == kQuantBlock && kLaneNumel == kNoisePerCall);

ZEROOPT_DEVICE int lane_index() {
  return static_cast<int>(threadIdx.x) % kWarp;
}

/// Of all warps of the grid.
ZEROOPT_DEVICE int64_t warp_index() {
  return static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
}

ZEROOPT_DEVICE int64_t num_warps() {
  return static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
}

/// The elements [first + low, first + high) of a segment.
struct LaneRange {
  int64_t first; ///< below 0 where vectors are cut before the segment begins
  int low, high; ///< the lane's elements that lie in the segment
  bool whole;    ///< all 8 do, and can be loaded as vectors

  ZEROOPT_INLINE LaneRange of(int64_t tile_begin, int lane, int64_t numel, bool aligned) {
    const int64_t first = tile_begin + lane * kLaneNumel;
    const int64_t left = numel - first;
    const int low = first < 0 ? static_cast<int>(-first) : 0;
    const int high = left < 0 ? 0 : left < kLaneNumel ? static_cast<int>(left) : kLaneNumel;
    return {first, low, high, aligned && low == 0 && high == kLaneNumel};
  }
};

/// 16 random bits for each of a lane's elements.
struct LaneNoise {
  uint64_t half[2]; ///< of elements 0 to 3, and 4 to 7
};

ZEROOPT_DEVICE uint32_t noise_of(const LaneNoise& noise, int k) {
  return static_cast<uint32_t>(noise.half[k / 4] >> (k % 4 * 16)) & 0xffffu;
}

ZEROOPT_DEVICE bool holds(const LaneRange& lane, int k) {
  return k >= lane.low && k < lane.high;
}

/// A lane's elements of an array; 0 for those that are not in it.
template <class T> ZEROOPT_DEVICE void load_lane(const T* address, const LaneRange& lane, T (&items)[kLaneNumel]) {
  const T* const array = in_global(address);
  if (lane.whole) {
    const Vector<T, kLaneNumel> vector = load_vector<T, kLaneNumel>(array + lane.first);
#pragma unroll
    for (int k = 0; k < kLaneNumel; ++k)
      items[k] = vector.items[k];
  } else {
#pragma unroll
    for (int k = 0; k < kLaneNumel; ++k)
      items[k] = holds(lane, k) ? array[lane.first + k] : T{};
  }
}

template <class T> ZEROOPT_DEVICE void store_lane(T* address, const LaneRange& lane, const T (&items)[kLaneNumel]) {
  T* const array = in_global(address);
  if (lane.whole) {
    Vector<T, kLaneNumel> vector;
#pragma unroll
    for (int k = 0; k < kLaneNumel; ++k)
      vector.items[k] = items[k];
    store_vector(array + lane.first, vector);
  } else {
#pragma unroll
    for (int k = 0; k < kLaneNumel; ++k)
      if (holds(lane, k)) array[lane.first + k] = items[k];
  }
}

/// load_lane, as the type that elements are computed in.
template <class T, class Value>
ZEROOPT_DEVICE void load_as(const void* array, const LaneRange& lane, Value (&values)[kLaneNumel]) {
  T items[kLaneNumel];
  load_lane(static_cast<const T*>(array), lane, items);
#pragma unroll
  for (int k = 0; k < kLaneNumel; ++k)
    values[k] = load(items[k]);
}

template <class T, class Value>
ZEROOPT_DEVICE void store_as(const Value (&values)[kLaneNumel], const LaneRange& lane, void* array) {
  T items[kLaneNumel];
#pragma unroll
  for (int k = 0; k < kLaneNumel; ++k)
    store(items[k], static_cast<typename Compute<T, T>::type>(values[k]));
  store_lane(static_cast<T*>(array), lane, items);
}

/// The largest of 32 lanes, for all of them.
ZEROOPT_DEVICE int32_t warp_max(int32_t value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const int32_t other = __shfl_xor_sync(kAllLanes, value, distance);
    value = other > value ? other : value;
  }
  return value;
}

/// The sum of 32 lanes, in one order for all of them.
template <class T> ZEROOPT_DEVICE T warp_sum(T value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

} // namespace zeroopt::cuda
