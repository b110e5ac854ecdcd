// Even shares of a range for threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/openmp.h"

namespace zeroopt::cpu {

constexpr int64_t kLine = 64; // elements; shares begin at multiples, so that no two threads write to one cache line

/// Where share `index` of `count` begins; share `count` is the end.
inline int64_t share_begin(int64_t numel, int64_t index, int64_t count) {
  if (index == count) return numel;
  return numel / count * index / kLine * kLine;
}

/// Threads that are worth their start for numel elements, at least `grain` for each.
inline int worthwhile_threads(int64_t numel, int64_t grain, int num_threads) {
  return static_cast<int>(std::clamp<int64_t>(numel / grain, 1, std::max(num_threads, 1)));
}

/// Calls body(index) for every index below count, each on its own thread where there is OpenMP. body must not throw.
template <class Body> void parallel(int count, const Body& body) {
  if (count == 1) return body(0);
  run_parallel(count, [](const void* body, int index) { (*static_cast<const Body*>(body))(index); }, &body);
}

} // namespace zeroopt::cpu
