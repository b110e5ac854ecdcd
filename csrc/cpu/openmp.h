// The threads of kernels are those that torch's own operations run on. The OpenMP runtime is looked up in the process,
// not linked: torch's wheels bring one, some under a name of their own (libgomp-a34b3233.so.1), beside which one that
// is linked would be a second, with a second set of threads for the same cores.
#pragma once

#include <string>

namespace zeroopt::cpu {

/// The file of the runtime in use: the one that torch's libtorch_cpu.so calls, else one that is loaded, else the
/// system's libgomp.so.1. Empty without any of them: everything then runs on the calling thread. Chosen at the first
/// call, so torch is to be imported before.
const std::string& openmp_library();

/// Calls call(body, index) for every index below count, on up to as many threads. It must not throw.
void run_parallel(int count, void (*call)(const void* body, int index), const void* body);

} // namespace zeroopt::cpu
