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

#include "ops/op.h"

namespace zeroopt {

struct AdamW : StepOp {
  static constexpr const char* kName = "adamw";
  // decoupled: AdamW's decay of the parameter, else Adam's L2 term in the gradient
  ZEROOPT_COLUMNS(lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize);
  static constexpr State kStates[] = {{"exp_avg", kSigned, kAlways},
                                      {"exp_avg_sq", kUnsigned, kAlways},
                                      {"max_exp_avg_sq", kUnsigned, Column::amsgrad}};

  struct Scalars {
    float grad_factor;
    float l2;          ///< weight_decay of Adam, 0 for AdamW
    float param_decay; ///< 1 - lr * weight_decay for AdamW, 1 for Adam
    float beta1, one_minus_beta1;
    float beta2, one_minus_beta2;
    float root_scale; ///< 1 / sqrt(1 - beta2^t)
    float eps;
    float step_size; ///< lr / (1 - beta1^t)
  };

  ZEROOPT_INLINE Scalars scalars(const Group& group, const SegmentScalars& segment) {
    const bool decoupled = group.decoupled != 0;
    const double step = segment.step;
    Scalars s;
    s.grad_factor = group.maximize != 0 ? -segment.grad_factor : segment.grad_factor;
    s.l2 = static_cast<float>(decoupled ? 0.0 : group.weight_decay);
    s.param_decay = static_cast<float>(decoupled ? 1.0 - group.lr * group.weight_decay : 1.0);
    s.beta1 = static_cast<float>(group.beta1);
    s.one_minus_beta1 = static_cast<float>(1.0 - group.beta1);
    s.beta2 = static_cast<float>(group.beta2);
    s.one_minus_beta2 = static_cast<float>(1.0 - group.beta2);
    s.root_scale = static_cast<float>(1.0 / sqrt(1.0 - pow(group.beta2, step)));
    s.eps = static_cast<float>(group.eps);
    s.step_size = static_cast<float>(group.lr / (1.0 - pow(group.beta1, step)));
    return s;
  }

  template <unsigned states, int size>
  ZEROOPT_INLINE void element(const Scalars& s, float& p, float g, float (&state)[size], float&) {
    g *= s.grad_factor;
    g = s.l2 != 0.0f ? g + s.l2 * p : g; // not g + 0 * p, which is NaN for an infinite p
    p *= s.param_decay;
    float& m = state[0];
    float& v = state[1];
    m = lerp(m, g, s.beta1, s.one_minus_beta1);
    v = s.beta2 * v + s.one_minus_beta2 * g * g;
    float second_moment = v;
    if constexpr (states >> 2 & 1u) {
      const bool larger = (v > state[2]) | (v != v); // a NaN is kept, as torch.maximum does
      second_moment = larger ? v : state[2];
      state[2] = second_moment;
    }
    p -= s.step_size * m / (sqrtf(second_moment) * s.root_scale + s.eps);
  }
};

} // namespace zeroopt
