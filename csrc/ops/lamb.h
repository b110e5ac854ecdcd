// One element of LAMB (You et al. 2020, arXiv:1904.00962, algorithm 2, with the identity for phi), in two passes, for
// the length of the whole update has to be known before any of it is applied.
//
//   m <- m + (1 - beta1) * (g - m)
//   v <- beta2 * v + (1 - beta2) * g * g
//   u  = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * p
//   p <- p - lr * |p| / |u| * u        the norms over the parameter; their ratio is 1 where either is 0
#pragma once

#include <math.h>

#include "ops/op.h"

namespace zeroopt {

/// What both passes share.
struct Lamb : StepOp {
  static constexpr const char* kName = "lamb";
  ZEROOPT_COLUMNS(lr, beta1, beta2, eps, weight_decay, maximize);
  static constexpr State kStates[] = {{"exp_avg", kSigned, kAlways}, {"exp_avg_sq", kUnsigned, kAlways}};

  struct Scalars {
    float grad_factor;
    float beta1, one_minus_beta1;
    float beta2, one_minus_beta2;
    float m_scale;    ///< 1 / (1 - beta1^t)
    float root_scale; ///< 1 / sqrt(1 - beta2^t)
    float eps;
    float weight_decay;
    float step_size; ///< lr * |p| / |u|, for the second pass
  };

  ZEROOPT_INLINE Scalars scalars(const Group& group, const SegmentScalars& segment) {
    Scalars s;
    s.grad_factor = group.maximize != 0 ? -segment.grad_factor : segment.grad_factor;
    s.beta1 = static_cast<float>(group.beta1);
    s.one_minus_beta1 = static_cast<float>(1.0 - group.beta1);
    s.beta2 = static_cast<float>(group.beta2);
    s.one_minus_beta2 = static_cast<float>(1.0 - group.beta2);
    s.m_scale = static_cast<float>(1.0 / (1.0 - pow(group.beta1, segment.step)));
    s.root_scale = static_cast<float>(1.0 / sqrt(1.0 - pow(group.beta2, segment.step)));
    s.eps = static_cast<float>(group.eps);
    s.weight_decay = static_cast<float>(group.weight_decay);
    const double param = segment.squares[0], update = segment.squares[1];
    const double ratio = param > 0.0 && update > 0.0 ? sqrt(param / update) : 1.0;
    s.step_size = static_cast<float>(group.lr * ratio);
    return s;
  }

  ZEROOPT_INLINE float direction(const Scalars& s, float p, float m, float v) {
    const float u = s.m_scale * m / (sqrtf(v) * s.root_scale + s.eps);
    return s.weight_decay != 0.0f ? u + s.weight_decay * p : u;
  }
};

/// Steps the moments, leaves the parameter, and sums the squares of parameter and update in each segment. Where a
/// parameter lies in several segments, on several ranks, their sums are to be added up before the second pass.
struct LambMoments : Lamb {
  static constexpr const char* kPass = "moments";
  static constexpr bool kWritesParam = false;
  static constexpr bool kSumsSquares = true;

  template <unsigned, int size>
  ZEROOPT_INLINE void element(const Scalars& s, float& p, float g, float (&state)[size], float& update) {
    g *= s.grad_factor;
    state[0] = lerp(state[0], g, s.beta1, s.one_minus_beta1);
    state[1] = s.beta2 * state[1] + s.one_minus_beta2 * g * g;
    update = direction(s, p, state[0], state[1]);
  }
};

/// Steps the parameter by the update, its length scaled by the trust ratio that follows from the sums.
struct LambUpdate : Lamb {
  static constexpr const char* kPass = "update";
  static constexpr bool kReadsGrad = false;
  static constexpr bool kWritesStates = false;
  static constexpr bool kCountsStep = false;

  template <unsigned, int size>
  ZEROOPT_INLINE void element(const Scalars& s, float& p, float, float (&state)[size], float&) {
    p -= s.step_size * direction(s, p, state[0], state[1]);
  }
};

} // namespace zeroopt
