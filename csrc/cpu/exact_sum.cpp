#include <vector>

#include "cpu/cache_line.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace zeroopt::cpu {

constexpr int64_t kGrain = 64 * 1024; // elements a thread

void sum_in_parts(const float* values, int64_t numel, double scale, bool squared, const double* rounders, double* sums,
                  int num_threads) {
  const int threads = worthwhile_threads(numel, kGrain, num_threads);
  struct alignas(kCacheLineBytes) Sums {
    double part[kSumParts] = {};
  };
  std::vector<Sums> of_thread(static_cast<size_t>(threads));
  parallel(threads, [&](int index) {
    const int64_t begin = share_begin(numel, index, threads), end = share_begin(numel, index + 1, threads);
    isa().leaves->sum_in_parts(values + begin, end - begin, scale, squared, rounders,
                               of_thread[static_cast<size_t>(index)].part);
  });
  for (int part = 0; part < kSumParts; ++part) {
    sums[part] = 0.0;
    for (const Sums& each : of_thread)
      sums[part] += each.part[part];
  }
}

} // namespace zeroopt::cpu
