// One element of RMSprop (Tieleman & Hinton 2012, lecture 6.5), centered as in Graves 2013 (arXiv:1308.0850, equations
// 38 to 42) and with momentum, in the form and order of operations of torch.optim.RMSprop.
//
//   g <- g + weight_decay * p
//   v <- alpha * v + (1 - alpha) * g * g
//   a <- a + (1 - alpha) * (g - a)                 centered only
//   u  = g / (sqrt(v) + eps)                       centered: g / (sqrt(v - a * a) + eps)
//   b <- momentum * b + u                          with momentum, and then u = b
//   p <- p - lr * u
//
// v - a * a is a variance. Where rounding, of 8-bit states above all, has made it negative it counts as 0, which under
// torch is a NaN.
#pragma once

#include <float.h>
#include <math.h>

#include "ops/op.h"

namespace zeroopt {

struct RmsProp : StepOp {
  static constexpr const char* kName = "rmsprop";
  ZEROOPT_COLUMNS(lr, alpha, eps, weight_decay, momentum, centered, maximize);
  static constexpr State kStates[] = {{"square_avg", kUnsigned, kAlways},
                                      {"momentum_buffer", kSigned, Column::momentum},
                                      {"grad_avg", kSigned, Column::centered}};

  struct Scalars {
    float grad_factor;
    float weight_decay;
    float lr;
    float alpha, one_minus_alpha;
    float eps;
    float momentum;
  };

  ZEROOPT_INLINE Scalars scalars(const Group& group, const SegmentScalars& segment) {
    Scalars s;
    s.grad_factor = group.maximize != 0 ? -segment.grad_factor : segment.grad_factor;
    s.weight_decay = static_cast<float>(group.weight_decay);
    s.lr = static_cast<float>(group.lr);
    s.alpha = static_cast<float>(group.alpha);
    s.one_minus_alpha = static_cast<float>(1.0 - group.alpha);
    s.eps = static_cast<float>(group.eps);
    s.momentum = static_cast<float>(group.momentum);
    return s;
  }

  template <unsigned states, int size>
  ZEROOPT_INLINE void element(const Scalars& s, float& p, float g, float (&state)[size], float&) {
    g *= s.grad_factor;
    g = s.weight_decay != 0.0f ? g + s.weight_decay * p : g; // not g + 0 * p, which is NaN for an infinite p
    state[0] = s.alpha * state[0] + s.one_minus_alpha * g * g;
    float variance = state[0];
    if constexpr (states >> 2 & 1u) {
      state[2] = lerp(state[2], g, s.alpha, s.one_minus_alpha);
      const float square = state[2] * state[2];
      variance -= square > FLT_MAX ? FLT_MAX : square; // where both overflow, the larger one has: v
      variance = variance < 0.0f ? 0.0f : variance;    // a NaN stays one
    }
    const float divisor = sqrtf(variance) + s.eps;
    if constexpr (states >> 1 & 1u) {
      state[1] = s.momentum * state[1] + g / divisor;
      p -= s.lr * state[1];
    } else {
      p -= s.lr * g / divisor;
    }
  }
};

} // namespace zeroopt
