// sgd: one step over a bucket. bytes: 12 an element, 20 with momentum.
#pragma once

#include "cuda/segment_work.cuh"
#include "ops/sgd.h"

namespace zeroopt::cuda {

__global__ void sgd_prepare_kernel(const float* param, SegmentTable table, const SgdGroup* groups,
                                   Workspace<SgdScalars> workspace) {
  prepare_segments(param, table, workspace,
                   [groups](int64_t group, float step) { return sgd_scalars(groups[group], step); });
}

template <bool momentum> __global__ void sgd_kernel(SgdTensors t, SegmentTable table, Workspace<SgdScalars> workspace) {
  constexpr int N = kStepVector;
  const int64_t ahead = lead(t.param);
  const bool aligned = in_step(t.grad, ahead) && (!momentum || in_step(t.momentum_buffer, ahead));
  auto vectors = [&t](int64_t i, const SgdScalars& s) {
    const bool use_buffer = momentum && s.momentum != 0.0f;
    Vector<float, N> p = load_vector<float, N>(t.param + i);
    const Vector<float, N> g = load_vector<float, N>(t.grad + i);
    Vector<float, N> buffer = g;
    if (use_buffer) buffer = load_vector<float, N>(t.momentum_buffer + i);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      sgd_element(s, p.items[k], g.items[k], use_buffer ? &buffer.items[k] : nullptr);
    }
    store_vector(t.param + i, p);
    if (use_buffer) store_vector(t.momentum_buffer + i, buffer);
  };
  auto element = [&t](int64_t i, const SgdScalars& s) {
    const bool use_buffer = momentum && s.momentum != 0.0f;
    sgd_element(s, t.param[i], t.grad[i], use_buffer ? t.momentum_buffer + i : nullptr);
  };
  for_each_vector(t.param, table, workspace, aligned, vectors, element);
}

} // namespace zeroopt::cuda
