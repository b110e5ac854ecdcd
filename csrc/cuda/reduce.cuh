// reduce: the sum of slices in order. bytes: num_slices * sizeof(slice) + sizeof(out) * (base ? 2 : 1).
#pragma once

#include "common/dtype.h"
#include "cuda/vector.cuh"

namespace zeroopt::cuda {

template <class Slice, class Out> struct ReduceShape {
  /// Elements of a vector: 16 bytes of the narrower type, so that both sides are whole 16-byte words.
  static constexpr int vector_numel = kVectorBytes / (sizeof(Slice) < sizeof(Out) ? sizeof(Slice) : sizeof(Out));
};

/// Elements [first, first + N) at once; all arrays have a 16-byte boundary at `first`.
template <class Slice, class Out, int N>
ZEROOPT_DEVICE void reduce_vector(const Slice* const* slices, int64_t num_slices, const Out* base, Out* out,
                                  int64_t first) {
  typename Compute<Slice, Out>::type sum[N];
  const Vector<Slice, N> first_slice = load_vector<Slice, N>(slices[0] + first);
#pragma unroll
  for (int k = 0; k < N; ++k)
    sum[k] = load(first_slice.items[k]);
  for (int64_t s = 1; s < num_slices; ++s) {
    const Vector<Slice, N> slice = load_vector<Slice, N>(slices[s] + first);
#pragma unroll
    for (int k = 0; k < N; ++k)
      sum[k] += load(slice.items[k]);
  }
  if (base != nullptr) {
    const Vector<Out, N> start = load_vector<Out, N>(base + first);
#pragma unroll
    for (int k = 0; k < N; ++k)
      sum[k] = load(start.items[k]) + sum[k];
  }
  Vector<Out, N> result;
#pragma unroll
  for (int k = 0; k < N; ++k)
    store(result.items[k], sum[k]);
  store_vector(out + first, result);
}

template <class Slice, class Out>
ZEROOPT_DEVICE void reduce_element(const Slice* const* slices, int64_t num_slices, const Out* base, Out* out,
                                   int64_t i) {
  typename Compute<Slice, Out>::type sum = load(slices[0][i]);
  for (int64_t s = 1; s < num_slices; ++s)
    sum += load(slices[s][i]);
  if (base != nullptr) sum = load(base[i]) + sum;
  store(out[i], sum);
}

/// out may be base or a slice, so nothing is read through the read-only cache.
template <class Slice, class Out>
__global__ void reduce_kernel(const Slice* const* slices, int64_t num_slices, const Out* base, Out* out,
                              int64_t numel) {
  constexpr int N = ReduceShape<Slice, Out>::vector_numel;
  const int64_t ahead = lead(out);
  bool aligned = base == nullptr || in_step(base, ahead);
  for (int64_t s = 0; s < num_slices; ++s)
    aligned = aligned && in_step(slices[s], ahead);
  const int64_t vectors = num_vectors(numel, ahead, N);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t v = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; v < vectors; v += stride) {
    const int64_t first = v * N - ahead;
    if (aligned && first >= 0 && first + N <= numel) {
      reduce_vector<Slice, Out, N>(slices, num_slices, base, out, first);
    } else {
      for (int64_t i = first < 0 ? 0 : first; i < first + N && i < numel; ++i) {
        reduce_element(slices, num_slices, base, out, i);
      }
    }
  }
}

} // namespace zeroopt::cuda
