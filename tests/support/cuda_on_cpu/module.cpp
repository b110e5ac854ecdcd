// The CUDA kernels as C functions, of the names and arguments that zeroopt._C has for them. They return whether the
// kernel ran; last_error() says why it did not.
#include "cuda_runtime.h"

#include <exception>
#include <string>

#include "kernels.h"

using namespace zeroopt;

namespace {

using Address = uintptr_t;

std::string error;

template <class T> T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class Kernel> bool run(const Kernel& kernel) {
  try {
    kernel();
    return true;
  } catch (const std::exception& exception) {
    error = exception.what();
    return false;
  }
}

SegmentTable segment_table(Address rows, Address active, Address steps, Address squares, int64_t count) {
  return {pointer<const SegmentRow>(rows), pointer<const uint8_t>(active), pointer<float>(steps),
          pointer<double>(squares), count};
}

} // namespace

extern "C" {

bool cuda_step(const char* kernel, Address rows, Address active, Address steps, Address squares, int64_t count,
               int param, int grad, int state, Address groups, Address grad_scale, Address clip_coef, Address found_inf,
               uint64_t seed, int64_t total_numel, Address workspace, Address stream) {
  return run([&] {
    cuda::step(
        kernel, segment_table(rows, active, steps, squares, count),
        {static_cast<ParamFormat>(param), static_cast<DType>(grad), static_cast<StateFormat>(state)},
        pointer<const double>(groups),
        {pointer<const float>(grad_scale), pointer<const float>(clip_coef), pointer<const float>(found_inf), seed},
        total_numel, pointer<void>(workspace), pointer<void>(stream));
  });
}

bool cuda_pack_segments(Address rows, Address active, int64_t count, int src_dtype, int dst_dtype, double scale,
                        Address stream) {
  return run([&] {
    cuda::pack_segments(segment_table(rows, active, 0, 0, count), static_cast<DType>(src_dtype),
                        static_cast<DType>(dst_dtype), scale, pointer<void>(stream));
  });
}

bool cuda_squared_norms(Address rows, Address active, Address squares, int64_t count, int grad, Address found_inf,
                        int64_t total_numel, Address workspace, Address stream) {
  return run([&] {
    cuda::squared_norms(segment_table(rows, active, 0, squares, count), static_cast<DType>(grad),
                        pointer<float>(found_inf), total_numel, pointer<void>(workspace), pointer<void>(stream));
  });
}

bool cuda_quantize(Address values, Address codes, Address scales, int64_t numel, bool is_signed, Address stream) {
  return run([&] {
    cuda::quantize(pointer<const float>(values), pointer<uint8_t>(codes), pointer<float>(scales), numel, is_signed,
                   pointer<void>(stream));
  });
}

bool cuda_dequantize(Address codes, Address scales, Address values, int64_t numel, bool is_signed, Address stream) {
  return run([&] {
    cuda::dequantize(pointer<const uint8_t>(codes), pointer<const float>(scales), pointer<float>(values), numel,
                     is_signed, pointer<void>(stream));
  });
}

bool cuda_try_launch(Address stream) {
  return run([&] { cuda::try_launch(pointer<void>(stream)); });
}

int cuda_driver_version() {
  return cuda::driver_version();
}

bool cuda_pack(Address src, int src_dtype, Address dst, int dst_dtype, int64_t numel, double scale, Address stream) {
  return run([&] {
    cuda::pack(pointer<const void>(src), static_cast<DType>(src_dtype), pointer<void>(dst),
               static_cast<DType>(dst_dtype), numel, scale, pointer<void>(stream));
  });
}

bool cuda_reduce(Address slices, int64_t num_slices, int slice_dtype, Address base, Address out, int out_dtype,
                 int64_t numel, Address stream) {
  return run([&] {
    cuda::reduce(pointer<const void* const>(slices), num_slices, static_cast<DType>(slice_dtype),
                 pointer<const void>(base), pointer<void>(out), static_cast<DType>(out_dtype), numel,
                 pointer<void>(stream));
  });
}

bool cuda_encode_slices(Address values, int dtype, Address residual, Address encoded, int64_t slice_numel,
                        int64_t num_slices, int bits, uint64_t seed, uint32_t step, uint32_t key, Address stream) {
  return run([&] {
    cuda::encode_slices(pointer<const void>(values), static_cast<DType>(dtype), pointer<uint16_t>(residual),
                        pointer<uint8_t>(encoded), slice_numel, num_slices, bits, seed, step, key,
                        pointer<void>(stream));
  });
}

bool cuda_sum_encoded(Address slices, int64_t num_slices, int bits, Address base, Address out, int out_dtype,
                      int64_t numel, Address stream) {
  return run([&] {
    cuda::sum_encoded(pointer<const uint8_t* const>(slices), num_slices, bits, pointer<const void>(base),
                      pointer<void>(out), static_cast<DType>(out_dtype), numel, pointer<void>(stream));
  });
}

int64_t cuda_norm_workspace_bytes(int64_t num_segments, int64_t total_numel) {
  return cuda::norm_workspace_bytes(num_segments, total_numel);
}

int64_t cuda_step_workspace_bytes(const char* kernel, int64_t num_segments, int64_t total_numel) {
  return cuda::step_workspace_bytes(kernel, num_segments, total_numel);
}

const char* last_error() {
  return error.c_str();
}

/// How grids are sized, in which order threads and blocks run, and how much slower than float32 float64 is.
void configure(int num_multiprocessors, bool reverse_order, int float64_ratio) {
  cuda_on_cpu::num_multiprocessors = num_multiprocessors;
  cuda_on_cpu::reverse_order = reverse_order;
  cuda_on_cpu::float64_ratio = float64_ratio;
}

} // extern "C"
