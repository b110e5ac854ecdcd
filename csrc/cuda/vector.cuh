// 16-byte accesses to arrays that begin anywhere.
//
// An array is walked in vectors of N elements that are cut at 16-byte boundaries of memory. The first vector may begin
// before the array and the last may end after it; these two are handled one element at a time.
//
//   memory      |....|....|....|....|....|      (.) an element, | a boundary
//   array          [-----------------)
//   vectors     <0   ><1  ><2  ><3   >          vector v holds elements v * N - lead(array) and on
#pragma once

#include <stdint.h>

#include "common/host_device.h"

namespace zeroopt::cuda {

constexpr int kVectorBytes = 16;
constexpr int kThreads = 256;

/// N elements that are loaded and stored 16 bytes at a time.
template <class T, int N> struct alignas(kVectorBytes) Vector {
  static_assert(sizeof(T) * N % kVectorBytes == 0, "a vector is whole 16-byte words");
  T items[N];
};

template <class T, int N> ZEROOPT_INLINE Vector<T, N> load_vector(const T* array) {
  return *reinterpret_cast<const Vector<T, N>*>(array);
}

template <class T, int N> ZEROOPT_INLINE void store_vector(T* array, const Vector<T, N>& vector) {
  *reinterpret_cast<Vector<T, N>*>(array) = vector;
}

/// Elements between the 16-byte boundary at or before the array and the array.
template <class T> ZEROOPT_INLINE int64_t lead(const T* array) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(array) % kVectorBytes / sizeof(T));
}

/// Whether an array has a boundary where another, with that lead, has one.
template <class T> ZEROOPT_INLINE bool in_step(const T* array, int64_t lead) {
  return reinterpret_cast<uintptr_t>(array - lead) % kVectorBytes == 0;
}

/// Vectors that cover an array.
ZEROOPT_INLINE int64_t num_vectors(int64_t numel, int64_t lead, int vector_numel) {
  return (numel + lead + vector_numel - 1) / vector_numel;
}

} // namespace zeroopt::cuda
