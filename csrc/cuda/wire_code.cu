#include "cuda/wire_code.cuh"

#include "cuda/launch.h"

namespace zeroopt::cuda {
namespace {

template <int bits, class Value>
void launch_encode(const void* values, uint16_t* residual, uint8_t* encoded, int64_t slice_numel, int64_t num_slices,
                   const NoiseKey& key, cudaStream_t stream) {
  const auto kernel = encode_kernel<bits, Value>;
  const int64_t blocks = num_quant_blocks(slice_numel) * num_slices / kWarpsPerBlock + 1;
  launch("encode_slices", kernel, grid_size(kernel, blocks, "encode_slices"), stream, static_cast<const Value*>(values),
         residual, encoded, slice_numel, num_slices, key);
}

template <int bits, class Out, int capacity>
void launch_sum_list(const uint8_t* const* slices, int64_t num_slices, const void* base, void* out, int64_t numel,
                     cudaStream_t stream) {
  SliceList<uint8_t, capacity> list = {};
  for (int64_t i = 0; i < num_slices; ++i)
    list.items[i] = slices[i];
  const auto kernel = sum_encoded_kernel<bits, Out, capacity>;
  const int64_t blocks = num_quant_blocks(numel) / kWarpsPerBlock + 1;
  launch("sum_encoded", kernel, grid_size(kernel, blocks, "sum_encoded"), stream, list, num_slices,
         static_cast<const Out*>(base), static_cast<Out*>(out), numel);
}

template <int bits, class Out>
void launch_sum(const uint8_t* const* slices, int64_t num_slices, const void* base, void* out, int64_t numel,
                cudaStream_t stream) {
  const auto launch_for =
      num_slices > kGroup ? launch_sum_list<bits, Out, kMaxReduceSlices> : launch_sum_list<bits, Out, kGroup>;
  launch_for(slices, num_slices, base, out, numel, stream);
}

void check_bits(int bits) {
  if (bits != 4 && bits != 8) throw std::invalid_argument("codes have 4 or 8 bits, not " + std::to_string(bits));
}

[[noreturn]] void no_codes() {
  throw std::invalid_argument("there are no codes for this dtype");
}

} // namespace

void encode_slices(const void* values, DType dtype, uint16_t* residual, uint8_t* encoded, int64_t slice_numel,
                   int64_t num_slices, int bits, uint64_t seed, uint32_t step, uint32_t key, void* stream) {
  check_bits(bits);
  if (slice_numel * num_slices == 0) return;
  const NoiseKey noise_key = {seed, step, key, kWireNoise};
  const auto queue = static_cast<cudaStream_t>(stream);
  const auto launch_as = [&](auto launch_4, auto launch_8) {
    (bits == 4 ? launch_4 : launch_8)(values, residual, encoded, slice_numel, num_slices, noise_key, queue);
  };
  if (dtype == DType::float32) return launch_as(launch_encode<4, float>, launch_encode<8, float>);
  if (dtype == DType::bfloat16) return launch_as(launch_encode<4, BFloat16>, launch_encode<8, BFloat16>);
  if (dtype == DType::float16) return launch_as(launch_encode<4, Float16>, launch_encode<8, Float16>);
  no_codes();
}

void sum_encoded(const uint8_t* const* slices, int64_t num_slices, int bits, const void* base, void* out,
                 DType out_dtype, int64_t numel, void* stream) {
  check_bits(bits);
  if (num_slices < 1 || num_slices > kMaxReduceSlices)
    throw std::invalid_argument("sum_encoded: expected 1 to " + std::to_string(kMaxReduceSlices) + " slices");
  if (numel == 0) return;
  const auto queue = static_cast<cudaStream_t>(stream);
  const auto launch_as = [&](auto launch_4, auto launch_8) {
    (bits == 4 ? launch_4 : launch_8)(slices, num_slices, base, out, numel, queue);
  };
  if (out_dtype == DType::float32) return launch_as(launch_sum<4, float>, launch_sum<8, float>);
  if (out_dtype == DType::bfloat16) return launch_as(launch_sum<4, BFloat16>, launch_sum<8, BFloat16>);
  if (out_dtype == DType::float16) return launch_as(launch_sum<4, Float16>, launch_sum<8, Float16>);
  no_codes();
}

} // namespace zeroopt::cuda
