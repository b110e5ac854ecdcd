// squared_norms: the sum of the squares of each segment's gradient. bytes: sizeof(grad).
#pragma once

#include "cuda/formats.cuh"
#include "cuda/segment_sums.cuh"

namespace zeroopt::cuda {

struct NormPlan {
  int lead;
};

template <DType grad>
__global__ void __launch_bounds__(kThreads) prepare_norm_kernel(SegmentTable table, Workspace<NormPlan> workspace) {
  const auto lead_of = [&](int64_t i) {
    return smallest_lead(leads_of(table.rows[i].grad, static_cast<int>(dtype_bytes(grad))));
  };
  plan_segments(table, workspace, false, lead_of, [](int64_t, int lead) { return NormPlan{lead}; });
}

template <DType grad>
__global__ void __launch_bounds__(kThreads) norm_kernel(SegmentTable table, Workspace<NormPlan> workspace) {
  for_each_tile(table, workspace, [&](int64_t segment, int64_t tile, const LaneRange& lane) {
    float values[kLaneNumel];
    load_grad(grad, table.rows[segment], lane, values);
    const double sum = warp_sum(sum_squares(values, lane));
    if (lane_index() == 0) workspace.sums[2 * tile] = sum;
  });
}

/// Inactive segments have no tiles, and so the sum 0.
static __global__ void __launch_bounds__(kThreads)
    norm_sums_kernel(SegmentTable table, float* found_inf, Workspace<NormPlan> workspace) {
  for_each_segment(table, workspace, [&](int64_t segment, int64_t begin, int64_t end) {
    const double sum = sum_tiles(workspace.sums, begin, end, 0);
    if (threadIdx.x != 0) return;
    table.squares[2 * segment] = sum;
    const bool finite = sum - sum == 0.0;
    if (!finite) *found_inf = 1.0f; // whoever else writes it writes the same
  });
}

} // namespace zeroopt::cuda
