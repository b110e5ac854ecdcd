// The threads of kernels are those that torch's own operations run on. The OpenMP runtime is looked up in the process,
// not linked: a wheel that links one has to carry a copy, with a second set of threads for the same cores, or cannot be
// imported where the system has none; and torch may have been built with another runtime than the compiler's.
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
