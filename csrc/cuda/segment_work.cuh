// Work over many segments in one launch.
//
// A prepare kernel makes each segment's plan, what the main kernel wants to know of it, and cuts the segments into
// strips, of a kernel's number of tiles in a row; inactive segments have none. The main kernel's warps stride over the
// strips. Both only read device memory, so a CUDA graph can capture them while steps, hyper-parameters and addresses
// change between replays.
#pragma once

#include "cuda/tiles.cuh"

namespace zeroopt::cuda {

constexpr int64_t kPlanBytes = 64; // that no plan exceeds
// Of as many threads as a warp has: a plan's scalars are float64, of which many GPUs compute few at a time, so they are
// spread over the multiprocessors.
constexpr int kPlansPerBlock = kWarp;

/// Parts of the device memory that a kernel is lent. Of Plan it needs a member `lead` and the constants kTiles, tiles
/// of a strip, and kSums, sums that a strip leaves.
template <class Plan> struct Workspace {
  int64_t* first_strip; ///< [count + 1]
  Plan* plans;          ///< [count]
  double* sums;         ///< [strips][kSums]
};

/// The most strips there can be; which segments are active, only the device knows.
template <class Plan> int64_t max_strips(int64_t num_segments, int64_t total_numel) {
  return total_numel / (kTile * Plan::kTiles) + 2 * num_segments;
}

/// Where the parts lie, in bytes from the workspace's beginning.
struct WorkspaceLayout {
  int64_t plans, sums, end;

  template <class Plan> static WorkspaceLayout of(int64_t num_segments, int64_t total_numel) {
    const int64_t plans = ((num_segments + 1) * 8 + 15) / 16 * 16;
    const int64_t sums = plans + num_segments * kPlanBytes;
    const int64_t num_sums = max_strips<Plan>(num_segments, total_numel) * Plan::kSums;
    return {plans, sums, sums + num_sums * static_cast<int64_t>(sizeof(double))};
  }
};

/// Blocks that plan_segments needs.
inline unsigned num_plan_blocks(int64_t num_segments) {
  return static_cast<unsigned>((num_segments + kPlansPerBlock - 1) / kPlansPerBlock);
}

template <class Plan> Workspace<Plan> workspace_at(void* memory, int64_t num_segments, int64_t total_numel) {
  static_assert(sizeof(Plan) <= kPlanBytes);
  const WorkspaceLayout layout = WorkspaceLayout::of<Plan>(num_segments, total_numel);
  char* const bytes = static_cast<char*>(memory);
  return {reinterpret_cast<int64_t*>(bytes), reinterpret_cast<Plan*>(bytes + layout.plans),
          reinterpret_cast<double*>(bytes + layout.sums)};
}

template <class Plan> ZEROOPT_DEVICE int64_t num_strips(int64_t numel, int lead) {
  return (num_tiles(numel, lead) + Plan::kTiles - 1) / Plan::kTiles;
}

/// Makes the plans of kPlansPerBlock segments, with all threads of the block, and says where their tiles are. Each
/// block counts for itself the tiles of all segments before its own, so that none waits for another.
/// @param skipped all segments count as inactive
/// @param lead_of lead_of(segment) is the lead of an active segment
/// @param make_plan make_plan(segment, lead) is its plan; called once
template <class Plan, class LeadOf, class MakePlan>
ZEROOPT_DEVICE void plan_segments(const SegmentTable& table, const Workspace<Plan>& workspace, bool skipped,
                                  const LeadOf& lead_of, const MakePlan& make_plan) {
  __shared__ int64_t strips_of_warp[kWarpsPerBlock]; // of the segments before this block's
  __shared__ int64_t strips_of_plan[kPlansPerBlock];
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kPlansPerBlock;
  const int64_t segment = begin + threadIdx.x;
  const bool is_planner = threadIdx.x < kPlansPerBlock && segment < table.count;
  const auto is_active = [&](int64_t i) { return !skipped && table.active[i] != 0; };

  int64_t strips = 0;
  for (int64_t i = threadIdx.x; i < begin; i += kThreads)
    if (is_active(i)) strips += num_strips<Plan>(table.rows[i].numel, lead_of(i));
  strips = warp_sum(strips);
  if (lane_index() == 0) strips_of_warp[threadIdx.x / kWarp] = strips;
  if (is_planner) {
    strips_of_plan[threadIdx.x] = 0;
    if (is_active(segment)) {
      const int lead = lead_of(segment);
      workspace.plans[segment] = make_plan(segment, lead);
      strips_of_plan[threadIdx.x] = num_strips<Plan>(table.rows[segment].numel, lead);
    }
  }
  __syncthreads();

  if (!is_planner) return;
  int64_t first = 0;
  for (int64_t before : strips_of_warp)
    first += before;
  for (unsigned t = 0; t < threadIdx.x; ++t)
    first += strips_of_plan[t];
  workspace.first_strip[segment] = first;
  if (segment + 1 == table.count) workspace.first_strip[table.count] = first + strips_of_plan[threadIdx.x];
}

/// Calls body(segment, strip, tile) for the strips of this warp, with all its lanes together.
/// tile: the strip's first, counted from the segment's
template <class Plan, class Body>
ZEROOPT_DEVICE void for_each_strip(const SegmentTable& table, const Workspace<Plan>& workspace, const Body& body) {
  const int64_t strips = workspace.first_strip[table.count];
  const auto first_strip = [&](int64_t i) { return workspace.first_strip[i]; };
  int64_t segment = 0;
  for (int64_t strip = warp_index(); strip < strips; strip += num_warps()) {
    segment = array_of(first_strip, segment, table.count, strip);
    body(segment, strip, (strip - workspace.first_strip[segment]) * Plan::kTiles);
  }
}

} // namespace zeroopt::cuda
