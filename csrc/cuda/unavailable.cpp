// What stands for the CUDA kernels in a build without a CUDA compiler.
#include "common/errors.h"
#include "kernels.h"

namespace zeroopt::cuda {
namespace {

[[noreturn]] void unavailable(const std::string& kernel) {
  throw KernelUnavailable("the CUDA kernel " + kernel +
                          " is not in this build of zeroopt, which was made without a CUDA compiler; with nvcc on PATH "
                          "run: ZEROOPT_CUDA=on pip install --force-reinstall --no-deps --no-binary zeroopt zeroopt");
}

} // namespace

void try_launch(void*) {
  unavailable("try_launch");
}

int driver_version() {
  unavailable("driver_version");
}

void pack(const void*, DType, void*, DType, int64_t, double, void*) {
  unavailable("pack");
}

void pack_segments(const SegmentTable&, DType, DType, double, void*) {
  unavailable("pack_segments");
}

void reduce(const void* const*, int64_t, DType, const void*, void*, DType, int64_t, void*) {
  unavailable("reduce");
}

void quantize(const float*, uint8_t*, float*, int64_t, bool, void*) {
  unavailable("quantize");
}

void dequantize(const uint8_t*, const float*, float*, int64_t, bool, void*) {
  unavailable("dequantize");
}

void encode_slices(const void*, DType, uint16_t*, uint8_t*, int64_t, int64_t, int, uint64_t, uint32_t, uint32_t,
                   void*) {
  unavailable("encode_slices");
}

void sum_encoded(const uint8_t* const*, int64_t, int, const void*, void*, DType, int64_t, void*) {
  unavailable("sum_encoded");
}

int64_t norm_workspace_bytes(int64_t, int64_t) {
  unavailable("squared_norms");
}

int64_t step_workspace_bytes(const std::string& kernel, int64_t, int64_t) {
  unavailable(kernel);
}

void squared_norms(const SegmentTable&, DType, float*, int64_t, void*, void*) {
  unavailable("squared_norms");
}

void step(const std::string& kernel, const SegmentTable&, const Storage&, const double*, const StepControl&, int64_t,
          void*, void*) {
  unavailable(kernel);
}

} // namespace zeroopt::cuda
