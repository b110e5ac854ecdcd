#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "kernels.h"

namespace zeroopt::cpu {
namespace {

constexpr int64_t kGrain = 64 * 1024; // elements a thread

/// Calls body(begin, numel) for ranges of whole blocks.
template <class Body> void over_blocks(int64_t numel, int num_threads, const Body& body) {
  const int64_t blocks = (numel + kQuantBlock - 1) / kQuantBlock;
  const int threads = worthwhile_threads(numel, kGrain, num_threads);
  parallel(threads, [&](int index) {
    const int64_t begin = blocks * index / threads * kQuantBlock;
    const int64_t end = std::min(blocks * (index + 1) / threads * kQuantBlock, numel);
    body(begin, end - begin);
  });
}

} // namespace

void quantize(const float* values, uint8_t* codes, float* scales, int64_t numel, bool is_signed, int num_threads) {
  const FormatTable& formats = *isa().leaves->formats;
  over_blocks(numel, num_threads, [&](int64_t begin, int64_t count) {
    float* const block_scales = scales + begin / kQuantBlock;
    if (is_signed)
      formats.encode_signed(values + begin, codes + begin, block_scales, count);
    else
      formats.encode_unsigned(values + begin, nullptr, codes + begin, block_scales, count);
  });
}

void dequantize(const uint8_t* codes, const float* scales, float* values, int64_t numel, bool is_signed,
                int num_threads) {
  const auto decode = isa().leaves->formats->decode[is_signed];
  over_blocks(numel, num_threads, [&](int64_t begin, int64_t count) {
    decode(codes + begin, scales + begin / kQuantBlock, values + begin, count);
  });
}

} // namespace zeroopt::cpu
