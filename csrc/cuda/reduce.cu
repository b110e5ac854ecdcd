#include "cuda/reduce.cuh"

#include "cuda/launch.h"

namespace zeroopt::cuda {
namespace {

template <class Slice, class Out>
void launch_pair(const void* const* slices, int64_t num_slices, const void* base, void* out, int64_t numel,
                 cudaStream_t stream) {
  constexpr int N = ReduceShape<Slice, Out>::vector_numel;
  const int64_t blocks = num_vectors(numel, N, N) / kThreads + 1;
  const auto kernel = num_slices > kGroup ? reduce_kernel<Slice, Out, true> : reduce_kernel<Slice, Out, false>;
  launch("reduce", kernel, grid_size(blocks, "reduce"), stream, reinterpret_cast<const Slice* const*>(slices),
         num_slices, static_cast<const Out*>(base), static_cast<Out*>(out), numel);
}

} // namespace

void reduce(const void* const* slices, int64_t num_slices, DType slice_dtype, const void* base, void* out,
            DType out_dtype, int64_t numel, void* stream) {
  if (num_slices < 1) throw std::invalid_argument("reduce: expected at least one slice");
  if (numel == 0) return;
  const auto queue = static_cast<cudaStream_t>(stream);
  auto is = [&](DType slice, DType result) { return slice_dtype == slice && out_dtype == result; };
  if (is(DType::float32, DType::float32)) return launch_pair<float, float>(slices, num_slices, base, out, numel, queue);
  if (is(DType::float32, DType::bfloat16))
    return launch_pair<float, BFloat16>(slices, num_slices, base, out, numel, queue);
  if (is(DType::float32, DType::float16))
    return launch_pair<float, Float16>(slices, num_slices, base, out, numel, queue);
  if (is(DType::float64, DType::float64))
    return launch_pair<double, double>(slices, num_slices, base, out, numel, queue);
  if (is(DType::bfloat16, DType::float32))
    return launch_pair<BFloat16, float>(slices, num_slices, base, out, numel, queue);
  if (is(DType::float16, DType::float32))
    return launch_pair<Float16, float>(slices, num_slices, base, out, numel, queue);
  if (is(DType::bfloat16, DType::bfloat16)) {
    return launch_pair<BFloat16, BFloat16>(slices, num_slices, base, out, numel, queue);
  }
  if (is(DType::float16, DType::float16))
    return launch_pair<Float16, Float16>(slices, num_slices, base, out, numel, queue);
  throw std::invalid_argument("reduce: there is no kernel for this pair of dtypes");
}

} // namespace zeroopt::cuda
