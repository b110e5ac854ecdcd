#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace zeroopt::cpu {

constexpr int64_t kGrain = 256 * 1024; // bytes a thread

void copy(const void* src, void* dst, int64_t bytes, int num_threads) {
  const CopyLeaf leaf = isa().leaves->copy;
  const int threads = worthwhile_threads(bytes, kGrain, num_threads);
  parallel(threads, [&](int index) {
    const int64_t begin = share_begin(bytes, index, threads);
    const int64_t end = share_begin(bytes, index + 1, threads);
    leaf(static_cast<const char*>(src) + begin, static_cast<char*>(dst) + begin, end - begin);
  });
}

} // namespace zeroopt::cpu
