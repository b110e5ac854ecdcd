#include "cuda/adamw.cuh"

#include "cuda/launch.h"

namespace zeroopt::cuda {

int64_t adamw_workspace_bytes(int64_t num_segments) {
  return Workspace<AdamWScalars>::bytes(num_segments);
}

void adamw(const AdamWTensors& tensors, const SegmentTable& segments, const AdamWGroup* groups, int64_t total_numel,
           void* workspace, void* stream) {
  if (segments.count == 0) return;
  const auto queue = static_cast<cudaStream_t>(stream);
  const auto parts = Workspace<AdamWScalars>::at(workspace, segments.count);
  const unsigned grid = grid_size(max_tiles(total_numel, segments.count), "adamw");
  adamw_prepare_kernel<<<1, kThreads, 0, queue>>>(tensors.param, segments, groups, parts);
  check(cudaGetLastError(), "adamw_prepare");
  if (tensors.max_exp_avg_sq == nullptr) {
    adamw_kernel<false><<<grid, kThreads, 0, queue>>>(tensors, segments, parts);
  } else {
    adamw_kernel<true><<<grid, kThreads, 0, queue>>>(tensors, segments, parts);
  }
  check(cudaGetLastError(), "adamw");
}

} // namespace zeroopt::cuda
