#include "cuda/norm.cuh"

#include "cuda/launch.h"

namespace zeroopt::cuda {
namespace {

constexpr const char* kName = "squared_norms";

/// Whether the device computes so much less in float64 than in float32 that sums would take longer than memory does.
bool has_slow_float64() {
  constexpr int kOftenAsSlow = 4; // 2 of GPUs for computing, 32 or 64 of others
  int device = 0;
  int ratio = 0;
  check(cudaGetDevice(&device), kName);
  check(cudaDeviceGetAttribute(&ratio, cudaDevAttrSingleToDoublePrecisionPerfRatio, device), kName);
  return ratio > kOftenAsSlow;
}

template <class T>
void launch_for(const SegmentTable& segments, float* found_inf, int64_t total_numel, void* workspace,
                cudaStream_t stream) {
  const auto parts = workspace_at<NormPlan>(workspace, segments.count, total_numel);
  const auto kernel = has_slow_float64() ? norm_kernel<T, PairSquares> : norm_kernel<T, Float64Squares>;
  const int64_t strips = max_strips<NormPlan>(segments.count, total_numel);
  const unsigned grid = grid_size(kernel, strips / kWarpsPerBlock + 1, kName);
  launch(kName, prepare_norm_kernel<T>, num_plan_blocks(segments.count), stream, segments, parts);
  launch(kName, kernel, grid, stream, segments, parts);
  launch(kName, norm_sums_kernel, grid_size(norm_sums_kernel, segments.count, kName), stream, segments, found_inf,
         parts);
}

} // namespace

int64_t norm_workspace_bytes(int64_t num_segments, int64_t total_numel) {
  return WorkspaceLayout::of<NormPlan>(num_segments, total_numel).end;
}

void squared_norms(const SegmentTable& segments, DType grad, float* found_inf, int64_t total_numel, void* workspace,
                   void* stream) {
  if (segments.count == 0) return;
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (grad) {
  case DType::float32:
    return launch_for<float>(segments, found_inf, total_numel, workspace, queue);
  case DType::bfloat16:
    return launch_for<BFloat16>(segments, found_inf, total_numel, workspace, queue);
  case DType::float16:
    return launch_for<Float16>(segments, found_inf, total_numel, workspace, queue);
  case DType::float64:
    throw std::invalid_argument("squared_norms: there is no kernel for float64");
  }
}

} // namespace zeroopt::cuda
