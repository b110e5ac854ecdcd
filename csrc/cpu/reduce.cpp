#include <stdexcept>

#include "common/dtype.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace zeroopt::cpu {

constexpr int64_t kGrain = 64 * 1024; // elements a thread

void reduce(const void* const* slices, int64_t num_slices, DType slice_dtype, const void* base, void* out,
            DType out_dtype, int64_t numel, int num_threads) {
  const ReduceLeaf leaf = isa().leaves->reduce->leaf[dtype_index(slice_dtype)][dtype_index(out_dtype)];
  if (leaf == nullptr) throw std::invalid_argument("reduce: there is no kernel for this pair of dtypes");
  if (num_slices < 1) throw std::invalid_argument("reduce: expected at least one slice");
  const int threads = worthwhile_threads(numel * num_slices, kGrain, num_threads);
  parallel(threads, [&](int index) {
    leaf(slices, num_slices, base, out, share_begin(numel, index, threads), share_begin(numel, index + 1, threads));
  });
}

} // namespace zeroopt::cpu
