// What stands for the CUDA kernels in a build without a CUDA compiler.
#include "common/errors.h"
#include "kernels.h"

namespace zeroopt::cuda {
namespace {

[[noreturn]] void unavailable(const char* kernel) {
  throw KernelUnavailable(std::string("the CUDA kernel ") + kernel +
                          " is not in this build of zeroopt, which was made without a CUDA compiler; with nvcc on PATH "
                          "run: ZEROOPT_CUDA=on pip install --force-reinstall --no-deps --no-binary zeroopt zeroopt");
}

} // namespace

void pack(const void*, DType, void*, DType, int64_t, double, void*) {
  unavailable("pack");
}

void reduce(const void* const*, int64_t, DType, const void*, void*, DType, int64_t, void*) {
  unavailable("reduce");
}

int64_t adamw_workspace_bytes(int64_t) {
  unavailable("adamw");
}

void adamw(const AdamWTensors&, const SegmentTable&, const AdamWGroup*, int64_t, void*, void*) {
  unavailable("adamw");
}

int64_t sgd_workspace_bytes(int64_t) {
  unavailable("sgd");
}

void sgd(const SgdTensors&, const SegmentTable&, const SgdGroup*, int64_t, void*, void*) {
  unavailable("sgd");
}

} // namespace zeroopt::cuda
