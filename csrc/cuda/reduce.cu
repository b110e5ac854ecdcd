#include "cuda/reduce.cuh"

#include "cuda/launch.h"

namespace zeroopt::cuda {
namespace {

template <class Slice, class Out, int capacity>
void launch_list(const void* const* slices, int64_t num_slices, const void* base, void* out, int64_t numel,
                 cudaStream_t stream) {
  SliceList<Slice, capacity> list = {};
  for (int64_t i = 0; i < num_slices; ++i)
    list.items[i] = static_cast<const Slice*>(slices[i]);
  constexpr int N = ReduceShape<Slice, Out>::vector_numel;
  const auto kernel = reduce_kernel<Slice, Out, capacity>;
  const int64_t blocks = num_vectors(numel, N, N) / kThreads + 1;
  launch("reduce", kernel, grid_size(kernel, blocks, "reduce"), stream, list, num_slices, static_cast<const Out*>(base),
         static_cast<Out*>(out), numel);
}

template <class Slice, class Out>
void launch_pair(const void* const* slices, int64_t num_slices, const void* base, void* out, int64_t numel,
                 cudaStream_t stream) {
  const auto launch_for =
      num_slices > kGroup ? launch_list<Slice, Out, kMaxReduceSlices> : launch_list<Slice, Out, kGroup>;
  launch_for(slices, num_slices, base, out, numel, stream);
}

} // namespace

void reduce(const void* const* slices, int64_t num_slices, DType slice_dtype, const void* base, void* out,
            DType out_dtype, int64_t numel, void* stream) {
  if (num_slices < 1 || num_slices > kMaxReduceSlices)
    throw std::invalid_argument("reduce: expected 1 to " + std::to_string(kMaxReduceSlices) + " slices");
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
