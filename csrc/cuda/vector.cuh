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
#include <string.h>

#include "common/host_device.h"

namespace zeroopt::cuda {

constexpr int kVectorBytes = 16;
constexpr int kThreads = 256;

/// Bytes at whose multiples N elements of `item_bytes` must lie to be loaded at once.
ZEROOPT_INLINE constexpr int vector_alignment(int item_bytes, int numel) {
  return item_bytes * numel < kVectorBytes ? item_bytes * numel : kVectorBytes;
}

/// N elements that are loaded and stored 16 bytes at a time, or all at once where they are fewer.
template <class T, int N> struct alignas(vector_alignment(sizeof(T), N)) Vector {
  static_assert(sizeof(T) * N % vector_alignment(sizeof(T), N) == 0, "a vector is whole words");
  T items[N];
};

/// An address that was itself read from memory, of which the compiler cannot know that it is not in shared or local
/// memory, and would ask at every access.
template <class T> ZEROOPT_DEVICE T* in_global(T* array) {
  __builtin_assume(__isGlobal(array));
  return array;
}

template <class T, int N> ZEROOPT_DEVICE Vector<T, N> load_vector(const T* array) {
  return *reinterpret_cast<const Vector<T, N>*>(array);
}

/// By instructions that the compiler cannot take apart: it would merge the store with those of single elements in the
/// other branch, since both write the same places, and store every element by itself.
template <class T, int N> ZEROOPT_DEVICE void store_vector(T* array, const Vector<T, N>& vector) {
#if defined(__CUDA_ARCH__)
  constexpr int kWords = sizeof(vector) / 4;
  uint32_t words[kWords];
  memcpy(words, &vector, sizeof(vector));
  const auto address = __cvta_generic_to_global(array);
  if constexpr (kWords == 2)
    asm("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(words[0]), "r"(words[1]) : "memory");
#pragma unroll
  for (int i = 0; i + 4 <= kWords; i += 4)
    asm("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address + 4 * i), "r"(words[i]), "r"(words[i + 1]),
        "r"(words[i + 2]), "r"(words[i + 3])
        : "memory");
#else
  *reinterpret_cast<Vector<T, N>*>(array) = vector;
#endif
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
