// sum_in_parts: terms in float64, each cut into multiples of three powers of two, whose sums are exact in any order.
// bytes: 4.
#include <cmath>

#include "cpu/leaf/table.h"

namespace zeroopt::cpu::ZEROOPT_ISA {
namespace {

template <bool squared>
void sum_terms(const float* values, int64_t numel, double scale, const double* rounders, double* sums) {
  constexpr int64_t kLanes = 16;
  const double first = rounders[0], second = rounders[1], third = rounders[2];
  double lanes[kSumParts][kLanes] = {};
  const auto add = [&](int64_t lane, double value) {
    const double term = squared ? value * value : std::fabs(value);
    const double part1 = (term + first) - first;
    const double rest = term - part1;
    const double part2 = (rest + second) - second;
    const double part3 = ((rest - part2) + third) - third;
    lanes[0][lane] += part1;
    lanes[1][lane] += part2;
    lanes[2][lane] += part3;
  };
  int64_t i = 0;
  for (; i + kLanes <= numel; i += kLanes) {
    ZEROOPT_VECTORIZE
    for (int64_t lane = 0; lane < kLanes; ++lane)
      add(lane, static_cast<double>(values[i + lane]) * scale);
  }
  for (int64_t lane = 0; i + lane < numel; ++lane)
    add(lane, static_cast<double>(values[i + lane]) * scale);
  for (int part = 0; part < kSumParts; ++part)
    for (double lane : lanes[part])
      sums[part] += lane;
}

} // namespace

void sum_in_parts(const float* values, int64_t numel, double scale, bool squared, const double* rounders,
                  double* sums) {
  if (squared)
    sum_terms<true>(values, numel, scale, rounders, sums);
  else
    sum_terms<false>(values, numel, scale, rounders, sums);
}

} // namespace zeroopt::cpu::ZEROOPT_ISA
