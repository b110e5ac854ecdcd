// A kernel that does nothing: whether it can be launched says whether the others can.
#include "cuda/launch.h"

namespace zeroopt::cuda {
namespace {

__global__ void empty_kernel() {}

} // namespace

void try_launch(void* stream) {
  launch("try_launch", empty_kernel, 1, static_cast<cudaStream_t>(stream));
}

int driver_version() {
  int version = 0;
  check(cudaDriverGetVersion(&version), "driver_version");
  return version;
}

} // namespace zeroopt::cuda
