// How many steps each segment has taken: a whole number below 2^48, kept exactly as the sum of two float32.
//
// The first of the two is that number rounded to float32, which torch's optimizers show; torch adds 1 to it, and so
// stops at 2^24. The second is what the first lacks, and counts from there on only: whoever sets what is shown to a
// small number, or to 0, begins anew.
#pragma once

#include "common/host_device.h"
#include "kernels.h"

namespace zeroopt {

ZEROOPT_INLINE double steps_taken(const SegmentTable& table, int64_t segment) {
  const float shown = table.steps[segment];
  const float rest = shown < 16777216.0f ? 0.0f : table.steps[table.count + segment]; // 2^24
  return static_cast<double>(shown) + static_cast<double>(rest);
}

/// Takes one more into account, and returns how many there are now.
ZEROOPT_INLINE double count_step(const SegmentTable& table, int64_t segment) {
  const double count = steps_taken(table, segment) + 1.0;
  table.steps[segment] = static_cast<float>(count);
  table.steps[table.count + segment] = static_cast<float>(count - static_cast<double>(table.steps[segment]));
  return count;
}

/// By what random numbers of steps differ, see philox.h: 2^32 steps later they come again.
ZEROOPT_INLINE uint32_t noise_step(double count) {
  return static_cast<uint32_t>(static_cast<uint64_t>(count));
}

} // namespace zeroopt
