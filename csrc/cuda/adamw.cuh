// adamw: one step over a bucket. bytes: 28 an element, 36 with AMSGrad.
#pragma once

#include "cuda/segment_work.cuh"
#include "ops/adamw.h"

namespace zeroopt::cuda {

__global__ void adamw_prepare_kernel(const float* param, SegmentTable table, const AdamWGroup* groups,
                                     Workspace<AdamWScalars> workspace) {
  prepare_segments(param, table, workspace,
                   [groups](int64_t group, float step) { return adamw_scalars(groups[group], step); });
}

template <bool amsgrad>
__global__ void adamw_kernel(AdamWTensors t, SegmentTable table, Workspace<AdamWScalars> workspace) {
  constexpr int N = kStepVector;
  const int64_t ahead = lead(t.param);
  const bool aligned = in_step(t.grad, ahead) && in_step(t.exp_avg, ahead) && in_step(t.exp_avg_sq, ahead) &&
                       (!amsgrad || in_step(t.max_exp_avg_sq, ahead));
  auto vectors = [&t](int64_t i, const AdamWScalars& s) {
    const bool use_max = amsgrad && s.amsgrad != 0.0f;
    Vector<float, N> p = load_vector<float, N>(t.param + i);
    const Vector<float, N> g = load_vector<float, N>(t.grad + i);
    Vector<float, N> m = load_vector<float, N>(t.exp_avg + i);
    Vector<float, N> v = load_vector<float, N>(t.exp_avg_sq + i);
    Vector<float, N> v_max = v;
    if (use_max) v_max = load_vector<float, N>(t.max_exp_avg_sq + i);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      adamw_element(s, p.items[k], g.items[k], m.items[k], v.items[k], use_max ? &v_max.items[k] : nullptr);
    }
    store_vector(t.param + i, p);
    store_vector(t.exp_avg + i, m);
    store_vector(t.exp_avg_sq + i, v);
    if (use_max) store_vector(t.max_exp_avg_sq + i, v_max);
  };
  auto element = [&t](int64_t i, const AdamWScalars& s) {
    const bool use_max = amsgrad && s.amsgrad != 0.0f;
    adamw_element(s, t.param[i], t.grad[i], t.exp_avg[i], t.exp_avg_sq[i], use_max ? t.max_exp_avg_sq + i : nullptr);
  };
  for_each_vector(t.param, table, workspace, aligned, vectors, element);
}

} // namespace zeroopt::cuda
