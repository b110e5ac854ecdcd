// sum_squares: in float64, over 16 lanes side by side, which are then added as a tree. bytes: 4.
//
// A float32's square is exact in float64, and too small to overflow there: the sum is finite when all elements are.
#include "cpu/leaf/table.h"

namespace zeroopt::cpu::ZEROOPT_ISA {

double sum_squares(const float* values, int64_t numel) {
  constexpr int64_t kLanes = 16;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= numel; i += kLanes) {
    ZEROOPT_VECTORIZE
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const double value = static_cast<double>(values[i + lane]);
      lanes[lane] += value * value;
    }
  }
  for (int64_t lane = 0; i + lane < numel; ++lane) {
    const double value = static_cast<double>(values[i + lane]);
    lanes[lane] += value * value;
  }
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t lane = 0; lane < width; ++lane)
      lanes[lane] += lanes[lane + width];
  return lanes[0];
}

} // namespace zeroopt::cpu::ZEROOPT_ISA
