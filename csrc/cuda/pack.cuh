// pack: cast and scale. bytes: sizeof(src) + sizeof(dst).
#pragma once

#include "common/dtype.h"
#include "cuda/vector.cuh"

namespace zeroopt::cuda {

template <class Src, class Dst>
ZEROOPT_DEVICE void pack_element(Src src, Dst& dst, typename Compute<Src, Dst>::type scale) {
  using Value = typename Compute<Src, Dst>::type;
  store(dst, static_cast<typename Compute<Dst, Dst>::type>(static_cast<Value>(load(src)) * scale));
}

template <class Src, class Dst> struct PackShape {
  /// Elements of a vector: 16 bytes of the narrower type, so that both sides are whole 16-byte words.
  static constexpr int vector_numel = kVectorBytes / (sizeof(Src) < sizeof(Dst) ? sizeof(Src) : sizeof(Dst));
};

template <class Src, class Dst>
__global__ void pack_kernel(const Src* src, Dst* dst, int64_t numel, typename Compute<Src, Dst>::type scale) {
  constexpr int N = PackShape<Src, Dst>::vector_numel;
  const int64_t ahead = lead(dst);
  const bool aligned = in_step(src, ahead);
  const int64_t vectors = num_vectors(numel, ahead, N);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t v = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; v < vectors; v += stride) {
    const int64_t first = v * N - ahead;
    if (aligned && first >= 0 && first + N <= numel) {
      const Vector<Src, N> in = load_vector<Src, N>(src + first);
      Vector<Dst, N> out;
#pragma unroll
      for (int k = 0; k < N; ++k)
        pack_element(in.items[k], out.items[k], scale);
      store_vector(dst + first, out);
    } else {
      for (int64_t i = first < 0 ? 0 : first; i < first + N && i < numel; ++i)
        pack_element(src[i], dst[i], scale);
    }
  }
}

} // namespace zeroopt::cuda
