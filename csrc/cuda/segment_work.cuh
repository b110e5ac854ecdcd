// Work over many segments in one launch.
//
// A prepare kernel makes each segment's plan, what the main kernel wants to know of it, and cuts the segments into
// tiles; inactive segments have none. The main kernel's warps stride over the tiles. Both only read device memory, so a
// CUDA graph can capture them while steps, hyper-parameters and addresses change between replays.
#pragma once

#include "cuda/tiles.cuh"

namespace zeroopt::cuda {

constexpr int64_t kPlanBytes = 64; // that no plan exceeds
// Of as many threads as a warp has: a plan's scalars are float64, of which many GPUs compute few at a time, so they are
// spread over the multiprocessors.
constexpr int kPlansPerBlock = kWarp;

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

/// Blocks that plan_segments needs.
inline unsigned num_plan_blocks(int64_t num_segments) {
  return static_cast<unsigned>((num_segments + kPlansPerBlock - 1) / kPlansPerBlock);
}

template <class Plan> Workspace<Plan> workspace_at(void* memory, int64_t num_segments, int64_t total_numel) {
  static_assert(sizeof(Plan) <= kPlanBytes);
  const WorkspaceLayout layout = WorkspaceLayout::of(num_segments, max_tiles(num_segments, total_numel));
  char* const bytes = static_cast<char*>(memory);
  return {reinterpret_cast<int64_t*>(bytes), reinterpret_cast<Plan*>(bytes + layout.plans),
          reinterpret_cast<double*>(bytes + layout.sums)};
}

/// Makes the plans of kPlansPerBlock segments, with all threads of the block, and says where their tiles are. Each
/// block counts for itself the tiles of all segments before its own, so that none waits for another.
/// @param skipped all segments count as inactive
/// @param lead_of lead_of(segment) is the lead of an active segment
/// @param make_plan make_plan(segment, lead) is its plan; called once
template <class Plan, class LeadOf, class MakePlan>
ZEROOPT_DEVICE void plan_segments(const SegmentTable& table, const Workspace<Plan>& workspace, bool skipped,
                                  const LeadOf& lead_of, const MakePlan& make_plan) {
  __shared__ int64_t tiles_of_warp[kWarpsPerBlock]; // of the segments before this block's
  __shared__ int64_t tiles_of_plan[kPlansPerBlock];
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kPlansPerBlock;
  const int64_t segment = begin + threadIdx.x;
  const bool is_planner = threadIdx.x < kPlansPerBlock && segment < table.count;
  const auto is_active = [&](int64_t i) { return !skipped && table.active[i] != 0; };

  int64_t tiles = 0;
  for (int64_t i = threadIdx.x; i < begin; i += kThreads)
    if (is_active(i)) tiles += num_tiles(table.rows[i].numel, lead_of(i));
  tiles = warp_sum(tiles);
  if (lane_index() == 0) tiles_of_warp[threadIdx.x / kWarp] = tiles;
  if (is_planner) {
    tiles_of_plan[threadIdx.x] = 0;
    if (is_active(segment)) {
      const int lead = lead_of(segment);
      workspace.plans[segment] = make_plan(segment, lead);
      tiles_of_plan[threadIdx.x] = num_tiles(table.rows[segment].numel, lead);
    }
  }
  __syncthreads();

  if (!is_planner) return;
  int64_t first = 0;
  for (int64_t before : tiles_of_warp)
    first += before;
  for (unsigned t = 0; t < threadIdx.x; ++t)
    first += tiles_of_plan[t];
  workspace.first_tile[segment] = first;
  if (segment + 1 == table.count) workspace.first_tile[table.count] = first + tiles_of_plan[threadIdx.x];
}

/// Calls body(segment, tile, lane) for the tiles of this warp, with all its lanes together.
template <class Plan, class Body>
ZEROOPT_DEVICE void for_each_tile(const SegmentTable& table, const Workspace<Plan>& workspace, const Body& body) {
  const int64_t tiles = workspace.first_tile[table.count];
  const auto first_tile = [&](int64_t i) { return workspace.first_tile[i]; };
  int64_t segment = 0;
  for (int64_t tile = warp_index(); tile < tiles; tile += num_warps()) {
    segment = array_of_tile(first_tile, segment, table.count, tile);
    const int lead = workspace.plans[segment].lead;
    body(segment, tile, lane_range(tile - workspace.first_tile[segment], table.rows[segment].numel, lead));
  }
}

} // namespace zeroopt::cuda
