// reduce: the sum of slices as a binary tree. bytes: num_slices * sizeof(slice) + sizeof(out) * (base ? 2 : 1).
//
// Which slices, the launch brings along among the kernel's arguments: nothing has to be copied to the device before.
#pragma once

#include "common/dtype.h"
#include "cuda/vector.cuh"
#include "kernels.h"

namespace zeroopt::cuda {

constexpr int kGroup = 8;  // slices that are summed in registers, a power of two
constexpr int kLevels = 5; // partial sums of 1, 2, 4, ... groups that can wait for the last one of kMaxReduceSlices
static_assert(kGroup << kLevels == kMaxReduceSlices);

template <class Slice, int capacity> struct SliceList {
  const Slice* items[capacity];
};

template <class Slice, class Out> struct ReduceShape {
  /// Elements of a vector: 16 bytes of the narrower type, so that both sides are whole 16-byte words.
  static constexpr int vector_numel = kVectorBytes / (sizeof(Slice) < sizeof(Out) ? sizeof(Slice) : sizeof(Out));
};

/// N elements of an array as the type that they are computed in. For N > 1 the array has a 16-byte boundary there.
template <class T, class Value, int N> ZEROOPT_DEVICE void load_values(const T* array, Value (&values)[N]) {
  if constexpr (N == 1) {
    values[0] = load(*array);
  } else {
    const Vector<T, N> vector = load_vector<T, N>(array);
#pragma unroll
    for (int k = 0; k < N; ++k)
      values[k] = load(vector.items[k]);
  }
}

template <class T, class Value, int N> ZEROOPT_DEVICE void store_values(T* array, const Value (&values)[N]) {
  if constexpr (N == 1) {
    store(*array, values[0]);
  } else {
    Vector<T, N> vector;
#pragma unroll
    for (int k = 0; k < N; ++k)
      store(vector.items[k], values[k]);
    store_vector(array, vector);
  }
}

template <class Value, int N> ZEROOPT_DEVICE void add_values(Value (&sum)[N], const Value (&values)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k)
    sum[k] += values[k];
}

/// The sum of the first `width` slices, or of all where there are fewer, in registers. All threads branch alike.
template <int width, class Slice, class Value, int N>
ZEROOPT_DEVICE void sum_group(const Slice* const* slices, int64_t num_slices, int64_t first, Value (&sum)[N]) {
  if constexpr (width == 1) {
    load_values(in_global(slices[0]) + first, sum);
  } else {
    constexpr int half = width / 2;
    sum_group<half>(slices, num_slices, first, sum);
    if (num_slices <= half) return;
    Value right[N];
    sum_group<half>(slices + half, num_slices - half, first, right);
    add_values(sum, right);
  }
}

/// The sum of up to kMaxReduceSlices slices, in local memory: groups are added up as a binary counter carries.
template <class Slice, class Value, int N>
ZEROOPT_DEVICE void sum_groups(const Slice* const* slices, int64_t num_slices, int64_t first, Value (&sum)[N]) {
  Value waiting[kLevels][N];
  int level = 0;
  for (int64_t group = 0; num_slices > kGroup; ++group) {
    sum_group<kGroup>(slices, kGroup, first, sum);
    for (int64_t carry = group; carry & 1; carry >>= 1)
      add_values(sum, waiting[--level]);
#pragma unroll
    for (int k = 0; k < N; ++k)
      waiting[level][k] = sum[k];
    ++level;
    slices += kGroup;
    num_slices -= kGroup;
  }
  sum_group<kGroup>(slices, num_slices, first, sum);
  while (level > 0)
    add_values(sum, waiting[--level]);
}

/// Elements [first, first + N) at once.
template <int N, bool many, class Slice, class Out>
ZEROOPT_DEVICE void reduce_elements(const Slice* const* slices, int64_t num_slices, const Out* base, Out* out,
                                    int64_t first) {
  typename Compute<Slice, Out>::type sum[N];
  if constexpr (many)
    sum_groups(slices, num_slices, first, sum);
  else
    sum_group<kGroup>(slices, num_slices, first, sum);
  if (base != nullptr) {
    typename Compute<Slice, Out>::type start[N];
    load_values(base + first, start);
    add_values(sum, start);
  }
  store_values(out + first, sum);
}

/// out may be base or a slice, so nothing is read through the read-only cache.
/// capacity: kGroup or kMaxReduceSlices. With the former the kernel takes no local memory.
template <class Slice, class Out, int capacity>
__global__ void reduce_kernel(const __grid_constant__ SliceList<Slice, capacity> list, int64_t num_slices,
                              const Out* base, Out* out, int64_t numel) {
  constexpr int N = ReduceShape<Slice, Out>::vector_numel;
  constexpr bool many = capacity > kGroup;
  const Slice* const* slices = list.items;
  const int64_t ahead = lead(out);
  bool aligned = base == nullptr || in_step(base, ahead);
  for (int64_t s = 0; s < num_slices; ++s)
    aligned = aligned && in_step(slices[s], ahead);
  const int64_t vectors = num_vectors(numel, ahead, N);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t v = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; v < vectors; v += stride) {
    const int64_t first = v * N - ahead;
    if (aligned && first >= 0 && first + N <= numel) {
      reduce_elements<N, many>(slices, num_slices, base, out, first);
    } else {
      for (int64_t i = first < 0 ? 0 : first; i < first + N && i < numel; ++i) {
        reduce_elements<1, many>(slices, num_slices, base, out, i);
      }
    }
  }
}

} // namespace zeroopt::cuda
