#include "cuda/sgd.cuh"

#include "cuda/launch.h"

namespace zeroopt::cuda {

int64_t sgd_workspace_bytes(int64_t num_segments) {
  return Workspace<SgdScalars>::bytes(num_segments);
}

void sgd(const SgdTensors& tensors, const SegmentTable& segments, const SgdGroup* groups, int64_t total_numel,
         void* workspace, void* stream) {
  if (segments.count == 0) return;
  const auto queue = static_cast<cudaStream_t>(stream);
  const auto parts = Workspace<SgdScalars>::at(workspace, segments.count);
  const unsigned grid = grid_size(max_tiles(total_numel, segments.count), "sgd");
  sgd_prepare_kernel<<<1, kThreads, 0, queue>>>(tensors.param, segments, groups, parts);
  check(cudaGetLastError(), "sgd_prepare");
  if (tensors.momentum_buffer == nullptr) {
    sgd_kernel<false><<<grid, kThreads, 0, queue>>>(tensors, segments, parts);
  } else {
    sgd_kernel<true><<<grid, kThreads, 0, queue>>>(tensors, segments, parts);
  }
  check(cudaGetLastError(), "sgd");
}

} // namespace zeroopt::cuda
