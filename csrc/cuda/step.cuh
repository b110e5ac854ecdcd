// One step of an optimizer over all segments. bytes: see kernels.h; an element is read and written once.
#pragma once

#include "common/step_count.h"
#include "cuda/formats.cuh"
#include "cuda/segment_sums.cuh"
#include "cuda/squares.cuh"
#include "cuda/step_formats.cuh"
#include "ops/op.h"

namespace zeroopt::cuda {

template <class Op> struct StepPlan {
  static constexpr int kTiles = 1;
  static constexpr int kSums = Op::kSumsSquares ? 2 : 0; // of the parameter's and the update's squares
  typename Op::Scalars scalars;
  unsigned states; ///< in use, as bits
  int lead;
  uint32_t step; ///< see noise_step
};

ZEROOPT_DEVICE bool is_skipped(const StepControl& control) {
  return control.found_inf != nullptr && *control.found_inf != 0.0f;
}

ZEROOPT_DEVICE float grad_factor(const StepControl& control) {
  const float unscale = control.grad_scale == nullptr ? 1.0f : 1.0f / *control.grad_scale;
  return control.clip_coef == nullptr ? unscale : unscale * *control.clip_coef;
}

/// Where the vectors of a segment's parameter may be cut; master weights included.
ZEROOPT_DEVICE unsigned param_leads(ParamFormat format, const SegmentRow& row) {
  const unsigned leads = leads_of(row.param, format == ParamFormat::float32 ? 4 : 2);
  if (format == ParamFormat::float32 || format == ParamFormat::bfloat16_stochastic) return leads;
  return leads & leads_of(row.master, format == ParamFormat::bfloat16_remainder ? 2 : 4);
}

ZEROOPT_DEVICE unsigned state_leads(StateFormat format, const void* array) {
  if (format == StateFormat::float32) return leads_of(array, 4);
  if (format == StateFormat::bfloat16) return leads_of(array, 2);
  return leads_of(array, 1) & 1u; // the blocks that share a scale begin with the segment
}

template <class Op> ZEROOPT_DEVICE int lead_of(const Storage& storage, const SegmentRow& row, unsigned states) {
  unsigned leads = param_leads(storage.param, row);
  if (Op::kReadsGrad) leads &= leads_of(row.grad, static_cast<int>(dtype_bytes(storage.grad)));
#pragma unroll
  for (int k = 0; k < kNumStates<Op>; ++k)
    if (states >> k & 1u) leads &= state_leads(storage.state, row.states[k]);
  return smallest_lead(leads);
}

template <class Op>
__global__ void __launch_bounds__(kThreads)
    prepare_step_kernel(SegmentTable table, Storage storage, const typename Op::Group* groups, StepControl control,
                        Workspace<StepPlan<Op>> workspace) {
  const float factor = grad_factor(control);
  const auto group_of = [&](int64_t i) { return groups[table.rows[i].group]; };
  const auto lead = [&](int64_t i) { return lead_of<Op>(storage, table.rows[i], states_in_use<Op>(group_of(i))); };
  plan_segments(table, workspace, is_skipped(control), lead, [&](int64_t i, int lead_of_segment) {
    const double step = Op::kCountsStep ? count_step(table, i) : steps_taken(table, i);
    const double* const squares = table.squares == nullptr ? nullptr : table.squares + 2 * i;
    const typename Op::Group group = group_of(i);
    return StepPlan<Op>{Op::scalars(group, {step, factor, squares}), states_in_use<Op>(group), lead_of_segment,
                        noise_step(step)};
  });
}

/// Steps a lane's elements. `param` and `update` are left for sums.
template <class Op, unsigned in_use, class Formats>
ZEROOPT_DEVICE void step_lane(const typename Op::Scalars& scalars, const Formats& formats, DType grad_dtype,
                              const SegmentRow& row, const LaneRange& lane, NoiseKey key, float (&param)[kLaneNumel],
                              float (&update)[kLaneNumel]) {
  constexpr int size = kNumStates<Op>;
  const typename Op::Scalars s = scalars; // a copy that no store can change
  float grad[kLaneNumel] = {};
  float states[size][kLaneNumel] = {};
  load_param(formats.param, row, lane, param);
#pragma unroll
  for (int k = 0; k < size; ++k)
    if (in_use >> k & 1u) load_state(formats.state, row, k, kSignedStates<Op> >> k & 1u, lane, states[k]);
  if (Op::kReadsGrad) load_grad(grad_dtype, row, lane, grad); // in a branch, in which 16 bits are waited for: last
#pragma unroll
  for (int i = 0; i < kLaneNumel; ++i) {
    float state[size] = {};
#pragma unroll
    for (int k = 0; k < size; ++k)
      state[k] = states[k][i];
    Op::template element<in_use>(s, param[i], grad[i], state, update[i]);
#pragma unroll
    for (int k = 0; k < size; ++k)
      states[k][i] = state[k];
  }
  if (Op::kWritesParam) store_param(formats.param, row, lane, key, param);
#pragma unroll
  for (int k = 0; k < size; ++k) {
    if (!Op::kWritesStates || !(in_use >> k & 1u)) continue;
    key.array = 1 + static_cast<uint32_t>(k);
    store_state(formats.state, row, k, kSignedStates<Op> >> k & 1u, lane, key, states[k]);
  }
}

/// Steps a lane's elements by the code for the states that are in use: the first k of them have been looked at.
template <class Op, int k = 0, unsigned found = 0, class... Args>
ZEROOPT_DEVICE void step_lane_using(unsigned in_use, Args&... args) {
  if constexpr (k == kNumStates<Op>) {
    step_lane<Op, found>(args...);
  } else if constexpr ((kOptionalStates<Op> >> k & 1u) == 0) {
    step_lane_using<Op, k + 1, (found | 1u << k)>(in_use, args...);
  } else {
    if (in_use >> k & 1u)
      step_lane_using<Op, k + 1, (found | 1u << k)>(in_use, args...);
    else
      step_lane_using<Op, k + 1, found>(in_use, args...);
  }
}

template <class Op, class Formats>
__global__ void __launch_bounds__(kThreads, kStepBlocks<Formats>)
    step_kernel(SegmentTable table, Formats formats, DType grad, StepControl control,
                Workspace<StepPlan<Op>> workspace) {
  for_each_strip(table, workspace, [&](int64_t segment, int64_t strip, int64_t tile) {
    const SegmentRow& row = table.rows[segment];
    const StepPlan<Op>& plan = workspace.plans[segment];
    const LaneRange lane = lane_range(tile, row.numel, plan.lead);
    const NoiseKey key = {control.seed, plan.step, static_cast<uint32_t>(row.key), 0};
    float param[kLaneNumel], update[kLaneNumel] = {};
    step_lane_using<Op>(plan.states, plan.scalars, formats, grad, row, lane, key, param, update);
    if constexpr (Op::kSumsSquares) {
      const double param_squares = warp_sum(add_squares(0.0, param, lane));
      const double update_squares = warp_sum(add_squares(0.0, update, lane));
      if (lane_index() != 0) return;
      workspace.sums[2 * strip] = param_squares;
      workspace.sums[2 * strip + 1] = update_squares;
    }
  });
}

/// squares of the segments that were stepped; the rows of others stay.
template <class Op>
__global__ void __launch_bounds__(kThreads) step_sums_kernel(SegmentTable table, Workspace<StepPlan<Op>> workspace) {
  for_each_segment(table, workspace, [&](int64_t segment, int64_t begin, int64_t end) {
    if (begin == end) return;
    const double param_squares = sum_strips(workspace, begin, end, 0);
    const double update_squares = sum_strips(workspace, begin, end, 1);
    if (threadIdx.x != 0) return;
    table.squares[2 * segment] = param_squares;
    table.squares[2 * segment + 1] = update_squares;
  });
}

} // namespace zeroopt::cuda
