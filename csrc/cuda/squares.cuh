// Sums of squares of a lane's float32 elements, to the precision of float64.
//
// A float32's square is exact in float64, and too small to overflow there: the sum is finite when all elements are.
// Each element takes a conversion and an addition in float64. Where a GPU computes 32 or 64 times fewer of those than
// of float32, as consumer cards and Blackwell Ultra do, they would take longer than memory. There the sum is a pair of
// float32, its value and what was rounded off, which a multiply-add and an exact sum of two give (T. J. Dekker, "A
// floating-point technique for extending the available precision", Numer. Math. 18, 1971; D. E. Knuth, TAOCP vol. 2,
// 4.2.2): about 2^-41 of the sum is lost at worst. Elements whose squares float32 cannot hold are summed in float64.
#pragma once

#include <math.h>

#include "cuda/lane.cuh"

namespace zeroopt::cuda {

/// sum + the squares of values that the lane's range holds.
ZEROOPT_DEVICE double add_squares(double sum, const float (&values)[kLaneNumel], const LaneRange& lane) {
#pragma unroll
  for (int k = 0; k < kLaneNumel; ++k) {
    const double value = holds(lane, k) ? static_cast<double>(values[k]) : 0.0;
    sum = fma(value, value, sum); // rounded once, as the sum with an exact square is
  }
  return sum;
}

/// In float64 throughout.
struct Float64Squares {
  double sum = 0.0;

  __device__ void add(const float (&values)[kLaneNumel], const LaneRange& lane) {
    sum = add_squares(sum, values, lane);
  }
  __device__ double total() const { return sum; }
};

/// value + error, exactly or nearly so.
struct FloatPair {
  float value = 0.0f;
  float error = 0.0f;

  __device__ void add(float other, float other_error) {
    const float sum = value + other;
    const float rounded = sum - value; // of the other
    error += (value - (sum - rounded)) + (other - rounded) + other_error;
    value = sum;
  }
};

/// In pairs of float32 but where squares leave the range in which these are exact.
struct PairSquares {
  static constexpr float kLeast = 0x1p-100f; // what is lost below float32's range, 2^-149 an element, is nothing to it
  static constexpr float kMost = 0x1p100f;   // all sums of a strip stay in range
  FloatPair sum;
  double rest = 0.0;

  __device__ void add(const float (&values)[kLaneNumel], const LaneRange& lane) {
    FloatPair squares;
    uint32_t magnitudes = 0; // 0: all elements are
#pragma unroll
    for (int k = 0; k < kLaneNumel; ++k) {
      const float value = holds(lane, k) ? values[k] : 0.0f;
      const float square = value * value;
      squares.add(square, fmaf(value, value, -square));
      magnitudes |= bits_of(value) << 1;
    }
    if (squares.value >= kLeast && squares.value <= kMost)
      sum.add(squares.value, squares.error);
    else if (magnitudes != 0u)
      rest = add_squares(rest, values, lane);
  }
  __device__ double total() const { return static_cast<double>(sum.value) + static_cast<double>(sum.error) + rest; }
};

} // namespace zeroopt::cuda
