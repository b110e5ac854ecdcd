// squared_norms: the sum of the squares of each segment's gradient. bytes: sizeof(grad).
#pragma once

#include "cuda/segment_sums.cuh"
#include "cuda/squares.cuh"

namespace zeroopt::cuda {

constexpr int kAtOnce = 4; // tiles of which a lane loads its elements before it uses any

struct NormPlan {
  static constexpr int kTiles = 8; // so many that what lanes add up among themselves costs little
  static constexpr int kSums = 1;
  int lead;
};

template <class T>
__global__ void __launch_bounds__(kThreads) prepare_norm_kernel(SegmentTable table, Workspace<NormPlan> workspace) {
  const auto lead_of = [&](int64_t i) {
    return smallest_lead(leads_of(table.rows[i].grad, static_cast<int>(sizeof(T))));
  };
  plan_segments(table, workspace, false, lead_of, [](int64_t, int lead) { return NormPlan{lead}; });
}

/// Adds kAtOnce tiles of which all elements are there: their loads are on the way together.
template <class T, class Squares> ZEROOPT_DEVICE void add_whole_tiles(const T* first, Squares& squares) {
  Vector<T, kLaneNumel> vectors[kAtOnce];
#pragma unroll
  for (int t = 0; t < kAtOnce; ++t)
    vectors[t] = load_vector<T, kLaneNumel>(first + t * kTile);
#pragma unroll
  for (int t = 0; t < kAtOnce; ++t) {
    float values[kLaneNumel];
#pragma unroll
    for (int k = 0; k < kLaneNumel; ++k)
      values[k] = load(vectors[t].items[k]);
    squares.add(values, LaneRange{0, 0, kLaneNumel, true});
  }
}

/// Squares: Float64Squares or PairSquares.
template <class T, class Squares>
__global__ void __launch_bounds__(kThreads) norm_kernel(SegmentTable table, Workspace<NormPlan> workspace) {
  for_each_strip(table, workspace, [&](int64_t segment, int64_t strip, int64_t tile) {
    const SegmentRow& row = table.rows[segment];
    const int lead = workspace.plans[segment].lead;
    const T* const grad = in_global(static_cast<const T*>(row.grad));
    Squares squares;
    for (int t = 0; t < NormPlan::kTiles; t += kAtOnce) {
      const LaneRange begin = lane_range(tile + t, row.numel, lead);
      const LaneRange end = lane_range(tile + t + kAtOnce - 1, row.numel, lead);
      if (begin.whole && end.whole) {
        add_whole_tiles(grad + begin.first, squares);
        continue;
      }
      for (int k = 0; k < kAtOnce; ++k) {
        const LaneRange lane = lane_range(tile + t + k, row.numel, lead);
        float values[kLaneNumel];
        load_as<T>(grad, lane, values);
        squares.add(values, lane);
      }
    }
    const double sum = warp_sum(squares.total());
    if (lane_index() == 0) workspace.sums[strip] = sum;
  });
}

/// Inactive segments have no strips, and so the sum 0.
static __global__ void __launch_bounds__(kThreads)
    norm_sums_kernel(SegmentTable table, float* found_inf, Workspace<NormPlan> workspace) {
  for_each_segment(table, workspace, [&](int64_t segment, int64_t begin, int64_t end) {
    const double sum = sum_strips(workspace, begin, end, 0);
    if (threadIdx.x != 0) return;
    table.squares[2 * segment] = sum;
    const bool finite = sum - sum == 0.0;
    if (!finite) *found_inf = 1.0f; // whoever else writes it writes the same
  });
}

} // namespace zeroopt::cuda
