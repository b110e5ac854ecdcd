// One element of AdamW (Loshchilov & Hutter 2019, algorithm 2) and of Adam with L2 regularisation (Kingma & Ba 2015,
// algorithm 1), with AMSGrad (Reddi et al. 2018, algorithm 2), in the order of operations of torch.optim.
//
//   g <- g + weight_decay * p                      Adam only
//   p <- p * (1 - lr * weight_decay)               AdamW only
//   m <- m + (1 - beta1) * (g - m)
//   v <- beta2 * v + (1 - beta2) * g * g
//   p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
#pragma once

#include <math.h>

#include "common/host_device.h"
#include "kernels.h"

namespace zeroopt {

/// What a group and a step number come to, the same for all elements of a segment.
struct AdamWScalars {
  float grad_sign;   ///< -1 to maximize
  float l2;          ///< weight_decay of Adam, 0 for AdamW
  float param_decay; ///< 1 - lr * weight_decay for AdamW, 1 for Adam
  float beta1, one_minus_beta1;
  float beta2, one_minus_beta2;
  float root_scale; ///< 1 / sqrt(1 - beta2^t)
  float eps;
  float step_size; ///< lr / (1 - beta1^t)
  float amsgrad;   ///< 1 or 0
};

/// @param step the number of this step, counted from 1
ZEROOPT_INLINE AdamWScalars adamw_scalars(const AdamWGroup& group, float step) {
  const bool decoupled = group.decoupled != 0;
  AdamWScalars s;
  s.grad_sign = group.maximize != 0 ? -1.0f : 1.0f;
  s.l2 = static_cast<float>(decoupled ? 0.0 : group.weight_decay);
  s.param_decay = static_cast<float>(decoupled ? 1.0 - group.lr * group.weight_decay : 1.0);
  s.beta1 = static_cast<float>(group.beta1);
  s.one_minus_beta1 = static_cast<float>(1.0 - group.beta1);
  s.beta2 = static_cast<float>(group.beta2);
  s.one_minus_beta2 = static_cast<float>(1.0 - group.beta2);
  s.root_scale = static_cast<float>(1.0 / sqrt(1.0 - pow(group.beta2, static_cast<double>(step))));
  s.eps = static_cast<float>(group.eps);
  s.step_size = static_cast<float>(group.lr / (1.0 - pow(group.beta1, static_cast<double>(step))));
  s.amsgrad = group.amsgrad != 0 ? 1.0f : 0.0f;
  return s;
}

/// @param v_max largest second moment so far, in/out, to divide by; null without AMSGrad
ZEROOPT_INLINE void adamw_element(const AdamWScalars& s, float& p, float g, float& m, float& v, float* v_max) {
  g *= s.grad_sign;
  g = s.l2 != 0.0f ? g + s.l2 * p : g; // not g + 0 * p, which is NaN for an infinite p
  p *= s.param_decay;
  // As torch.lerp: from the nearer end, so that m is g when beta1 is 0.
  const float change = g - m;
  m = s.one_minus_beta1 < 0.5f ? m + s.one_minus_beta1 * change : g - s.beta1 * change;
  v = s.beta2 * v + s.one_minus_beta2 * g * g;
  float second_moment = v;
  if (v_max != nullptr) {
    const bool larger = (v > *v_max) | (v != v); // a NaN is kept, as torch.maximum does
    second_moment = larger ? v : *v_max;
    *v_max = second_moment;
  }
  p -= s.step_size * m / (sqrtf(second_moment) * s.root_scale + s.eps);
}

} // namespace zeroopt
