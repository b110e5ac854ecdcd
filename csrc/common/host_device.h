// A function of the host and of CUDA devices, inlined wherever it is called.
//
// Inlined always, not just asked to be: csrc/cpu/leaf is compiled once per instruction set, and a function shared by
// those objects that stood on its own could be taken by the linker from the wrong one.
#pragma once

#if defined(__CUDACC__)
#define ZEROOPT_INLINE static __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define ZEROOPT_INLINE static inline __attribute__((always_inline))
#else
#define ZEROOPT_INLINE static __forceinline
#endif

// A function of CUDA device code, which uses threadIdx and the like.
#if defined(__CUDACC__)
#define ZEROOPT_DEVICE static __device__ __forceinline__
#else
#define ZEROOPT_DEVICE static inline
#endif
