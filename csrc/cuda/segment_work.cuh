// Work over many segments in one launch.
//
// A prepare kernel of one block makes each segment's plan, what the main kernel wants to know of it, and cuts the
// segments into tiles. The main kernel's warps stride over the tiles; which segment a tile is of, they find by
// bisection. Both only read device memory, so a CUDA graph can capture them while steps, hyper-parameters and addresses
// change between replays.
//
//   segments           |--- 0 ---|- 1 -|------ 2 ------|
//   tiles              | 0 | 1 |2| 3 |4| 5 | 6 | 7 | 8 |
//   first_tile         0           3     5               9      [count + 1]
//
// Inactive segments have no tiles. The vectors of a segment, and with them its tiles, are cut where all its arrays have
// a boundary, which may be some elements ahead of the segment.
#pragma once

#include "cuda/lane.cuh"

namespace zeroopt::cuda {

constexpr int kUnaligned = -1;     // a lead: there is no such place, elements are accessed one at a time
constexpr int64_t kPlanBytes = 64; // that no plan exceeds

/// Parts of the device memory that a kernel is lent. Plan has a member `lead`.
template <class Plan> struct Workspace {
  int64_t* first_tile; ///< [count + 1]
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

/// The numbers of elements, as bits, by which vectors may be cut ahead of an array.
ZEROOPT_DEVICE unsigned leads_of(const void* array, int item_bytes) {
  const uintptr_t alignment = static_cast<uintptr_t>(vector_alignment(item_bytes, kLaneNumel));
  unsigned leads = 0;
  for (int lead = 0; lead < kLaneNumel; ++lead)
    if ((reinterpret_cast<uintptr_t>(array) - static_cast<uintptr_t>(lead * item_bytes)) % alignment == 0)
      leads |= 1u << lead;
  return leads;
}

ZEROOPT_DEVICE int smallest_lead(unsigned leads) {
  for (int lead = 0; lead < kLaneNumel; ++lead)
    if (leads >> lead & 1u) return lead;
  return kUnaligned;
}

ZEROOPT_INLINE int64_t num_tiles(int64_t numel, int lead) {
  return (numel + (lead == kUnaligned ? 0 : lead) + kTile - 1) / kTile;
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

/// The segment that a tile is of: the last one whose first tile is not after it. Segments without tiles are passed
/// over.
ZEROOPT_DEVICE int64_t segment_of_tile(const int64_t* first_tile, int64_t count, int64_t tile) {
  int64_t low = 0;
  int64_t high = count;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (first_tile[middle] <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

/// Calls body(segment, tile, lane) for the tiles of this warp, with all its lanes together.
template <class Plan, class Body>
ZEROOPT_DEVICE void for_each_tile(const SegmentTable& table, const Workspace<Plan>& workspace, const Body& body) {
  const int64_t tiles = workspace.first_tile[table.count];
  for (int64_t tile = warp_index(); tile < tiles; tile += num_warps()) {
    const int64_t segment = segment_of_tile(workspace.first_tile, table.count, tile);
    const int lead = workspace.plans[segment].lead;
    const bool aligned = lead != kUnaligned;
    const int64_t tile_begin = (tile - workspace.first_tile[segment]) * kTile - (aligned ? lead : 0);
    body(segment, tile, LaneRange::of(tile_begin, lane_index(), table.rows[segment].numel, aligned));
  }
}

} // namespace zeroopt::cuda
