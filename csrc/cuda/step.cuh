// One step of an optimizer over all segments. bytes: see kernels.h; an element is read and written once.
#pragma once

#include "cuda/formats.cuh"
#include "cuda/segment_sums.cuh"
#include "ops/op.h"

namespace zeroopt::cuda {

template <class Op> struct StepPlan {
  typename Op::Scalars scalars;
  int lead;
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

template <class Op> ZEROOPT_DEVICE int lead_of(const Storage& storage, const SegmentRow& row, int num_states) {
  unsigned leads = param_leads(storage.param, row);
  if (Op::kReadsGrad) leads &= leads_of(row.grad, static_cast<int>(dtype_bytes(storage.grad)));
#pragma unroll
  for (int k = 0; k < Op::kMaxStates; ++k)
    if (k < num_states) leads &= state_leads(storage.state, row.states[k]);
  return smallest_lead(leads);
}

template <class Op>
__global__ void __launch_bounds__(kThreads)
    prepare_step_kernel(SegmentTable table, Storage storage, const typename Op::Group* groups, StepControl control,
                        Workspace<StepPlan<Op>> workspace) {
  const float factor = grad_factor(control);
  plan_segments(table, workspace, is_skipped(control), [&](int64_t i) {
    const SegmentRow& row = table.rows[i];
    if (Op::kCountsStep) table.steps[i] += 1.0f;
    const double* const squares = table.squares == nullptr ? nullptr : table.squares + 2 * i;
    StepPlan<Op> plan;
    plan.scalars = Op::scalars(groups[row.group], {table.steps[i], factor, squares});
    plan.lead = lead_of<Op>(storage, row, plan.scalars.num_states);
    return plan;
  });
}

/// Steps a lane's elements. `param` and `update` are left for sums.
template <class Op, int num_states>
ZEROOPT_DEVICE void step_lane(const typename Op::Scalars& scalars, const Storage& storage, const SegmentRow& row,
                              const LaneRange& lane, NoiseKey key, float (&param)[kLaneNumel],
                              float (&update)[kLaneNumel]) {
  constexpr int size = num_states > 0 ? num_states : 1;
  const typename Op::Scalars s = scalars; // a copy that no store can change
  float grad[kLaneNumel] = {};
  float states[size][kLaneNumel] = {};
  load_param(storage.param, row, lane, param);
  if (Op::kReadsGrad) load_grad(storage.grad, row, lane, grad);
#pragma unroll
  for (int k = 0; k < num_states; ++k)
    load_state(storage.state, row, k, Op::is_signed(k), lane, states[k]);
#pragma unroll
  for (int i = 0; i < kLaneNumel; ++i) {
    float state[size] = {};
#pragma unroll
    for (int k = 0; k < num_states; ++k)
      state[k] = states[k][i];
    Op::template element<num_states>(s, param[i], grad[i], state, update[i]);
#pragma unroll
    for (int k = 0; k < num_states; ++k)
      states[k][i] = state[k];
  }
  if (Op::kWritesParam) store_param(storage.param, row, lane, key, param);
#pragma unroll
  for (int k = 0; Op::kWritesStates && k < num_states; ++k) {
    key.array = 1 + static_cast<uint32_t>(k);
    store_state(storage.state, row, k, Op::is_signed(k), lane, key, states[k]);
  }
}

/// Two blocks on a multiprocessor at least, which leaves 128 registers a thread: else the compiler may prefer to spill
/// a few for a third one.
template <class Op>
__global__ void __launch_bounds__(kThreads, 2)
    step_kernel(SegmentTable table, Storage storage, StepControl control, Workspace<StepPlan<Op>> workspace) {
  for_each_tile(table, workspace, [&](int64_t segment, int64_t tile, const LaneRange& lane) {
    const SegmentRow& row = table.rows[segment];
    const typename Op::Scalars& scalars = workspace.plans[segment].scalars;
    const NoiseKey key = {control.seed, static_cast<uint32_t>(table.steps[segment]), static_cast<uint32_t>(row.key), 0};
    float param[kLaneNumel], update[kLaneNumel] = {};
    if (scalars.num_states == Op::kMinStates)
      step_lane<Op, Op::kMinStates>(scalars, storage, row, lane, key, param, update);
    else
      step_lane<Op, Op::kMaxStates>(scalars, storage, row, lane, key, param, update);
    if constexpr (Op::kSumsSquares) {
      const double param_squares = warp_sum(sum_squares(param, lane));
      const double update_squares = warp_sum(sum_squares(update, lane));
      if (lane_index() != 0) return;
      workspace.sums[2 * tile] = param_squares;
      workspace.sums[2 * tile + 1] = update_squares;
    }
  });
}

/// squares of the segments that were stepped; the rows of others stay.
template <class Op>
__global__ void __launch_bounds__(kThreads) step_sums_kernel(SegmentTable table, Workspace<StepPlan<Op>> workspace) {
  for_each_segment(table, workspace, [&](int64_t segment, int64_t begin, int64_t end) {
    if (begin == end) return;
    const double param_squares = sum_tiles(workspace.sums, begin, end, 0);
    const double update_squares = sum_tiles(workspace.sums, begin, end, 1);
    if (threadIdx.x != 0) return;
    table.squares[2 * segment] = param_squares;
    table.squares[2 * segment + 1] = update_squares;
  });
}

} // namespace zeroopt::cuda
