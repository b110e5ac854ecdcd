// Sums over segments, of the sums over strips that a kernel left in the workspace: one block a segment, in an order
// that depends on nothing but the number of strips. bytes: 8 / (kTile * kTiles) for each sum.
#pragma once

#include "cuda/segment_work.cuh"

namespace zeroopt::cuda {

/// One of their sums over strips [begin, end), valid in thread 0. All threads of the block call.
template <class Plan>
ZEROOPT_DEVICE double sum_strips(const Workspace<Plan>& workspace, int64_t begin, int64_t end, int which) {
  __shared__ double sum_of_warp[kWarpsPerBlock];
  double sum = 0.0;
#pragma unroll 8 // loads at once
  for (int64_t strip = begin + threadIdx.x; strip < end; strip += kThreads)
    sum += workspace.sums[Plan::kSums * strip + which];
  sum = warp_sum(sum);
  if (lane_index() == 0) sum_of_warp[threadIdx.x / kWarp] = sum;
  __syncthreads();
  double total = 0.0;
  for (int warp = 0; warp < kWarpsPerBlock; ++warp)
    total += sum_of_warp[warp];
  __syncthreads(); // the next call writes again
  return total;
}

/// Calls body(segment, first strip, end of its strips) for the segments of this block.
template <class Plan, class Body>
ZEROOPT_DEVICE void for_each_segment(const SegmentTable& table, const Workspace<Plan>& workspace, const Body& body) {
  for (int64_t i = blockIdx.x; i < table.count; i += gridDim.x)
    body(i, workspace.first_strip[i], workspace.first_strip[i + 1]);
}

} // namespace zeroopt::cuda
