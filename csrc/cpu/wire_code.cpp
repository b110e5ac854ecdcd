#include "common/wire_code.h"

#include <stdexcept>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace zeroopt::cpu {
namespace {

constexpr int64_t kGrain = 32 * 1024; // elements a thread: they take more time than to copy them

void check(const void* leaf, int bits) {
  if (bits != 4 && bits != 8) throw std::invalid_argument("codes have 4 or 8 bits, not " + std::to_string(bits));
  if (leaf == nullptr) throw std::invalid_argument("there are no codes for this dtype");
}

} // namespace

void encode_slices(const void* values, DType dtype, uint16_t* residual, uint8_t* encoded, int64_t slice_numel,
                   int64_t num_slices, int bits, uint64_t seed, uint32_t step, uint32_t key, int num_threads) {
  const WireEncodeLeaf leaf = isa().leaves->wire->encode[dtype_index(dtype)][bits == 8];
  check(reinterpret_cast<const void*>(leaf), bits);
  const NoiseKey noise_key = {seed, step, key, kWireNoise};
  const int64_t blocks = num_quant_blocks(slice_numel), slice_bytes = wire_bytes(slice_numel, bits);
  const int64_t steps_at = blocks * wire_block_bytes(bits);
  const int64_t zeros_at = steps_at + blocks * static_cast<int64_t>(sizeof(float));
  const int threads = worthwhile_threads(slice_numel * num_slices, kGrain, num_threads);
  for (int64_t slice = 0; slice < num_slices; ++slice) {
    uint8_t* const bytes = encoded + slice * slice_bytes;
    float* const steps = reinterpret_cast<float*>(bytes + steps_at);
    std::fill(bytes + zeros_at, bytes + slice_bytes, uint8_t{0});
    parallel(threads, [&](int index) {
      const int64_t first = blocks * index / threads, last = blocks * (index + 1) / threads;
      const int64_t begin = slice * slice_numel + first * kQuantBlock; // in the whole array
      const int64_t numel = std::min(last * kQuantBlock, slice_numel) - first * kQuantBlock;
      leaf(static_cast<const char*>(values) + begin * dtype_bytes(dtype),
           residual == nullptr ? nullptr : residual + begin, numel, bytes + first * wire_block_bytes(bits),
           steps + first, noise_key, static_cast<uint64_t>((slice * blocks + first) * kCallsPerBlock));
    });
  }
}

void sum_encoded(const uint8_t* const* slices, int64_t num_slices, int bits, const void* base, void* out,
                 DType out_dtype, int64_t numel, int num_threads) {
  const WireSumLeaf leaf = isa().leaves->wire->sum[dtype_index(out_dtype)][bits == 8];
  check(reinterpret_cast<const void*>(leaf), bits);
  if (num_slices < 1) throw std::invalid_argument("sum_encoded: expected at least one slice");
  const int64_t blocks = num_quant_blocks(numel);
  const int threads = worthwhile_threads(numel * num_slices, kGrain, num_threads);
  parallel(threads, [&](int index) {
    leaf(slices, num_slices, base, out, numel, blocks * index / threads, blocks * (index + 1) / threads);
  });
}

} // namespace zeroopt::cpu
