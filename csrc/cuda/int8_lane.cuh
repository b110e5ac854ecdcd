// 8-bit codes of a tile, whose lanes find their scale together. All lanes of the warp call.
#pragma once

#include "common/int8_code.h"
#include "cuda/lane.cuh"

namespace zeroopt::cuda {

ZEROOPT_DEVICE void load_codes(const uint8_t* codes, const float* scale, bool is_signed, const LaneRange& lane,
                               float (&values)[kLaneNumel]) {
  uint8_t items[kLaneNumel];
  load_lane(codes, lane, items);
  const float shared = *scale;
#pragma unroll
  for (int k = 0; k < kLaneNumel; ++k)
    values[k] = is_signed ? int8_decode<true>(shared, items[k]) : int8_decode<false>(shared, items[k]);
}

/// The largest magnitude of the warp's elements. Its result depends on what each lane decoded with the old scale, so
/// nobody still has to read that afterwards.
ZEROOPT_DEVICE int32_t largest_magnitude(const float (&values)[kLaneNumel], const LaneRange& lane) {
  int32_t largest = 0;
#pragma unroll
  for (int k = 0; k < kLaneNumel; ++k) {
    const int32_t magnitude = holds(lane, k) ? magnitude_of(values[k]) : 0;
    largest = magnitude > largest ? magnitude : largest;
  }
  return warp_max(largest);
}

ZEROOPT_DEVICE void store_signed_codes(const float (&values)[kLaneNumel], const LaneRange& lane, uint8_t* codes,
                                       float* scale) {
  const Int8Scale s = int8_scale<true>(largest_magnitude(values, lane));
  if (lane_index() == 0) *scale = s.scale;
  uint8_t items[kLaneNumel];
#pragma unroll
  for (int k = 0; k < kLaneNumel; ++k)
    items[k] = int8_encode_signed(s, values[k]);
  store_lane(codes, lane, items);
}

/// @param dither dither(k) is added to the code of element k before it is rounded
template <class Dither>
ZEROOPT_DEVICE void store_unsigned_codes(const float (&values)[kLaneNumel], const LaneRange& lane, uint8_t* codes,
                                         float* scale, const Dither& dither) {
  const Int8Scale s = int8_scale<false>(largest_magnitude(values, lane));
  if (lane_index() == 0) *scale = s.scale;
  uint8_t items[kLaneNumel];
#pragma unroll
  for (int k = 0; k < kLaneNumel; ++k)
    items[k] = int8_encode_unsigned(s, values[k], dither(k));
  store_lane(codes, lane, items);
}

} // namespace zeroopt::cuda
