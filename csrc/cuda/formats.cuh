// How parameters, gradients and moments are stored: a lane's elements as float32, and back. The formats are the same
// for a whole launch; for some they are constants, see step_formats.cuh.
#pragma once

#include "common/philox.h"
#include "cuda/int8_lane.cuh"

namespace zeroopt::cuda {

ZEROOPT_DEVICE LaneNoise join_words(const PhiloxWords<uint32_t>& words) {
  return {{words.word[0] | static_cast<uint64_t>(words.word[1]) << 32,
           words.word[2] | static_cast<uint64_t>(words.word[3]) << 32}};
}

/// Elements [first, first + 8) of a parameter; they may begin in the middle of a call, or before the parameter does.
ZEROOPT_DEVICE LaneNoise draw(const NoiseKey& key, int64_t first) {
  const uint64_t call = static_cast<uint64_t>(first >> 3);
  const int skipped = static_cast<int>(first & (kNoisePerCall - 1)); // elements of the call before the lane's
  LaneNoise bits = join_words(noise<uint32_t>(key, call));
  if (skipped == 0) return bits;
  LaneNoise next = join_words(noise<uint32_t>(key, call + 1));
  if (skipped >= 4) {
    bits = {{bits.half[1], next.half[0]}};
    next.half[0] = next.half[1];
  }
  const int shift = skipped % 4 * 16;
  if (shift == 0) return bits;
  return {{bits.half[0] >> shift | bits.half[1] << (64 - shift), bits.half[1] >> shift | next.half[0] << (64 - shift)}};
}

ZEROOPT_DEVICE void load_joined(const void* rounded, const void* remainders, const LaneRange& lane,
                                float (&values)[kLaneNumel]) {
  uint16_t upper[kLaneNumel], lower[kLaneNumel];
  load_lane(static_cast<const uint16_t*>(rounded), lane, upper);
  load_lane(static_cast<const uint16_t*>(remainders), lane, lower);
#pragma unroll
  for (int k = 0; k < kLaneNumel; ++k)
    values[k] = join_bfloat16(upper[k], lower[k]);
}

/// array[i] = round(values[k], k)
template <class Round>
ZEROOPT_DEVICE void store_rounded(const float (&values)[kLaneNumel], const LaneRange& lane, void* array,
                                  const Round& round) {
  uint16_t items[kLaneNumel];
#pragma unroll
  for (int k = 0; k < kLaneNumel; ++k)
    items[k] = round(values[k], k);
  store_lane(static_cast<uint16_t*>(array), lane, items);
}

ZEROOPT_DEVICE void store_stochastic(const float (&values)[kLaneNumel], const LaneRange& lane, void* array,
                                     const NoiseKey& key, int64_t segment_first) {
  const LaneNoise noise = draw(key, segment_first + lane.first);
  store_rounded(values, lane, array,
                [&noise](float value, int k) { return float_to_bfloat16_stochastic(value, noise_of(noise, k)); });
}

ZEROOPT_DEVICE void load_param(ParamFormat format, const SegmentRow& row, const LaneRange& lane,
                               float (&values)[kLaneNumel]) {
  switch (format) {
  case ParamFormat::float32:
    return load_lane(static_cast<const float*>(row.param), lane, values);
  case ParamFormat::bfloat16_master:
  case ParamFormat::float16_master:
    return load_lane(static_cast<const float*>(row.master), lane, values);
  case ParamFormat::bfloat16_remainder:
    return load_joined(row.param, row.master, lane, values);
  case ParamFormat::bfloat16_stochastic:
    return load_as<BFloat16>(row.param, lane, values);
  }
}

ZEROOPT_DEVICE void store_param(ParamFormat format, const SegmentRow& row, const LaneRange& lane, const NoiseKey& key,
                                const float (&values)[kLaneNumel]) {
  const auto ties_away = [](float value, int) { return float_to_bfloat16_ties_away(value); };
  switch (format) {
  case ParamFormat::float32:
    return store_lane(static_cast<float*>(row.param), lane, values);
  case ParamFormat::bfloat16_master:
    store_lane(static_cast<float*>(row.master), lane, values);
    return store_rounded(values, lane, row.param, ties_away);
  case ParamFormat::float16_master:
    store_lane(static_cast<float*>(row.master), lane, values);
    return store_rounded(values, lane, row.param, [](float value, int) { return float_to_float16(value); });
  case ParamFormat::bfloat16_remainder:
    store_rounded(values, lane, row.param, ties_away);
    return store_rounded(values, lane, row.master, [](float value, int) { return bfloat16_remainder(value); });
  case ParamFormat::bfloat16_stochastic:
    return store_stochastic(values, lane, row.param, key, row.first);
  }
}

ZEROOPT_DEVICE void load_grad(DType dtype, const SegmentRow& row, const LaneRange& lane, float (&values)[kLaneNumel]) {
  if (dtype == DType::float32) return load_lane(static_cast<const float*>(row.grad), lane, values);
  if (dtype == DType::bfloat16) return load_as<BFloat16>(row.grad, lane, values);
  load_as<Float16>(row.grad, lane, values);
}

/// The scale of the tile that a lane works on; tiles of segments with codes begin at the segment's first element.
ZEROOPT_DEVICE float* scale_of(const SegmentRow& row, int state, const LaneRange& lane) {
  return in_global(row.scales[state]) + lane.first / kQuantBlock;
}

ZEROOPT_DEVICE void load_state(StateFormat format, const SegmentRow& row, int state, bool is_signed,
                               const LaneRange& lane, float (&values)[kLaneNumel]) {
  const void* const array = row.states[state];
  if (format == StateFormat::float32) return load_lane(static_cast<const float*>(array), lane, values);
  if (format == StateFormat::bfloat16) return load_as<BFloat16>(array, lane, values);
  load_codes(static_cast<const uint8_t*>(array), scale_of(row, state, lane), is_signed, lane, values);
}

ZEROOPT_DEVICE void store_state(StateFormat format, const SegmentRow& row, int state, bool is_signed,
                                const LaneRange& lane, const NoiseKey& key, const float (&values)[kLaneNumel]) {
  void* const array = row.states[state];
  if (format == StateFormat::float32) return store_lane(static_cast<float*>(array), lane, values);
  if (format == StateFormat::bfloat16) return store_stochastic(values, lane, array, key, row.first);
  uint8_t* const codes = static_cast<uint8_t*>(array);
  float* const scale = scale_of(row, state, lane);
  if (is_signed) return store_signed_codes(values, lane, codes, scale);
  const LaneNoise noise = draw(key, row.first + lane.first);
  store_unsigned_codes(values, lane, codes, scale, [&noise](int k) { return int8_dither(noise_of(noise, k)); });
}

} // namespace zeroopt::cuda
