// 8-bit codes of a tile, whose lanes find their scale together. All lanes of the warp call.
#pragma once

#include "common/int8_code.h"
#include "cuda/lane.cuh"

namespace zeroopt::cuda {

ZEROOPT_DEVICE void load_codes(const uint8_t* codes, const float* scale, bool is_signed, const LaneRange& lane,
                               float (&values)[kLaneNumel]) {
  uint8_t items[kLaneNumel];
  load_lane(codes, lane, items);
  const float shared = *scale, magnitude = fabsf(shared);
#pragma unroll
  for (int k = 0; k < kLaneNumel; ++k)
    values[k] = is_signed ? int8_decode<true>(magnitude, items[k]) : int8_decode<false>(magnitude, items[k]);
  if (!int8_is_marked(shared)) return;
#pragma unroll
  for (int k = 0; k < kLaneNumel; ++k)
    values[k] = is_signed ? int8_unmark<true>(values[k], items[k]) : int8_unmark<false>(values[k], items[k]);
}

/// The largest of the warp's elements by a measure of magnitude.
template <class Measure>
ZEROOPT_DEVICE int32_t largest_by(const float (&values)[kLaneNumel], const LaneRange& lane, const Measure& measure) {
  int32_t largest = 0;
#pragma unroll
  for (int k = 0; k < kLaneNumel; ++k) {
    const int32_t magnitude = holds(lane, k) ? measure(values[k]) : 0;
    largest = magnitude > largest ? magnitude : largest;
  }
  return warp_max(largest);
}

/// The scale of the warp's elements. It depends on what each lane decoded with the old scale, so nobody still has to
/// read that afterwards.
template <bool is_signed>
ZEROOPT_DEVICE Int8Scale scale_of_warp(const float (&values)[kLaneNumel], const LaneRange& lane) {
  const int32_t largest = largest_by(values, lane, [](float value) { return magnitude_of(value); });
  if (largest < kInfiniteMagnitude) return int8_scale<is_signed>(largest);
  return int8_marked_scale<is_signed>(largest_by(values, lane, [](float value) { return finite_magnitude_of(value); }));
}

template <bool is_signed>
ZEROOPT_DEVICE void mark_codes(const Int8Scale& s, const float (&values)[kLaneNumel], uint8_t (&items)[kLaneNumel]) {
  if (!int8_is_marked(s.scale)) return;
#pragma unroll
  for (int k = 0; k < kLaneNumel; ++k)
    items[k] = int8_mark<is_signed>(values[k], items[k]);
}

ZEROOPT_DEVICE void store_signed_codes(const float (&values)[kLaneNumel], const LaneRange& lane, uint8_t* codes,
                                       float* scale) {
  const Int8Scale s = scale_of_warp<true>(values, lane);
  if (lane_index() == 0) *scale = s.scale;
  uint8_t items[kLaneNumel];
#pragma unroll
  for (int k = 0; k < kLaneNumel; ++k)
    items[k] = int8_encode_signed(s, values[k]);
  mark_codes<true>(s, values, items);
  store_lane(codes, lane, items);
}

/// @param dither dither(k) is added to the code of element k before it is rounded
template <class Dither>
ZEROOPT_DEVICE void store_unsigned_codes(const float (&values)[kLaneNumel], const LaneRange& lane, uint8_t* codes,
                                         float* scale, const Dither& dither) {
  const Int8Scale s = scale_of_warp<false>(values, lane);
  if (lane_index() == 0) *scale = s.scale;
  uint8_t items[kLaneNumel];
#pragma unroll
  for (int k = 0; k < kLaneNumel; ++k)
    items[k] = int8_encode_unsigned(s, values[k], dither(k));
  mark_codes<false>(s, values, items);
  store_lane(codes, lane, items);
}

} // namespace zeroopt::cuda
