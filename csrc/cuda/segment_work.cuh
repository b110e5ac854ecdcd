// Work over many segments in one launch.
//
// A prepare kernel of one block makes each segment's plan, what the main kernel wants to know of it, and cuts the
// segments into tiles; inactive segments have none. The main kernel's warps stride over the tiles; which segment a tile
// is of, they find by bisection. Both only read device memory, so a CUDA graph can capture them while steps,
// hyper-parameters and addresses change between replays.
#pragma once

#include "cuda/tiles.cuh"

namespace zeroopt::cuda {

constexpr int64_t kPlanBytes = 64; // that no plan exceeds

/// Parts of the device memory that a kernel is lent. Plan has a member `lead`.
template <class Plan> struct Workspace {
  int64_t* first_tile; ///< [count + 1]; see tiles.cuh
  Plan* plans;         ///< [count]
  double* sums;        ///< [tiles][2]
};

/// Where the parts lie, in bytes from the workspace's beginning.
struct WorkspaceLayout {
  int64_t plans, sums, end;

  ZEROOPT_INLINE WorkspaceLayout of(int64_t count, int64_t max_tiles) {
    const int64_t plans = ((count + 1) * 8 + 15) / 16 * 16;
    const int64_t sums = plans + count * kPlanBytes;
    return {plans, sums, sums + max_tiles * 2 * static_cast<int64_t>(sizeof(double))};
  }
};

/// The most tiles there can be; which segments are active, only the device knows.
inline int64_t max_tiles(int64_t num_segments, int64_t total_numel) {
  return total_numel / kTile + 2 * num_segments;
}

template <class Plan> Workspace<Plan> workspace_at(void* memory, int64_t num_segments, int64_t total_numel) {
  static_assert(sizeof(Plan) <= kPlanBytes);
  const WorkspaceLayout layout = WorkspaceLayout::of(num_segments, max_tiles(num_segments, total_numel));
  char* const bytes = static_cast<char*>(memory);
  return {reinterpret_cast<int64_t*>(bytes), reinterpret_cast<Plan*>(bytes + layout.plans),
          reinterpret_cast<double*>(bytes + layout.sums)};
}

/// One block of kThreads. make_plan(segment) gives the plan of an active segment; skipped: all count as inactive.
template <class Plan, class MakePlan>
ZEROOPT_DEVICE void plan_segments(const SegmentTable& table, const Workspace<Plan>& workspace, bool skipped,
                                  const MakePlan& make_plan) {
  __shared__ int64_t tiles_of_thread[kThreads];
  const int64_t share = (table.count + kThreads - 1) / kThreads;
  const int64_t begin = threadIdx.x * share;
  const int64_t end = begin + share < table.count ? begin + share : table.count;

  int64_t tiles = 0;
  for (int64_t i = begin; i < end; ++i) {
    if (skipped || table.active[i] == 0) continue;
    workspace.plans[i] = make_plan(i);
    tiles += num_tiles(table.rows[i].numel, workspace.plans[i].lead);
  }
  tiles_of_thread[threadIdx.x] = tiles;
  __syncthreads();

  int64_t before = 0;
  for (unsigned t = 0; t < threadIdx.x; ++t)
    before += tiles_of_thread[t];
  for (int64_t i = begin; i < end; ++i) {
    workspace.first_tile[i] = before;
    if (!skipped && table.active[i] != 0) before += num_tiles(table.rows[i].numel, workspace.plans[i].lead);
  }
  if (threadIdx.x == kThreads - 1) workspace.first_tile[table.count] = before;
}

/// Calls body(segment, tile, lane) for the tiles of this warp, with all its lanes together.
template <class Plan, class Body>
ZEROOPT_DEVICE void for_each_tile(const SegmentTable& table, const Workspace<Plan>& workspace, const Body& body) {
  const int64_t tiles = workspace.first_tile[table.count];
  const auto first_tile = [&](int64_t i) { return workspace.first_tile[i]; };
  for (int64_t tile = warp_index(); tile < tiles; tile += num_warps()) {
    const int64_t segment = array_of_tile(first_tile, 0, table.count, tile);
    const int lead = workspace.plans[segment].lead;
    body(segment, tile, lane_range(tile - workspace.first_tile[segment], table.rows[segment].numel, lead));
  }
}

} // namespace zeroopt::cuda
