#include "cpu/openmp.h"

#include <dlfcn.h>

namespace zeroopt::cpu {
namespace {

/// What compilers call for `#pragma omp parallel`. libgomp has it since GCC 4.9, and LLVM's and Intel's runtimes have
/// it for the sake of code that GCC has compiled.
struct Runtime {
  void (*parallel)(void (*share)(void*), void* argument, unsigned num_threads, unsigned flags) = nullptr;
  int (*thread_number)() = nullptr;
  int (*num_threads)() = nullptr;
  std::string file;
};

template <class Function> bool look_up(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

/// Whether a library, or one that it needs, is a runtime.
bool look_up(void* library, Runtime& runtime) {
  Runtime found;
  if (!look_up(library, "GOMP_parallel", found.parallel) ||
      !look_up(library, "omp_get_thread_num", found.thread_number) ||
      !look_up(library, "omp_get_num_threads", found.num_threads))
    return false;
  Dl_info info;
  const bool is_known = dladdr(reinterpret_cast<void*>(found.parallel), &info) != 0 && info.dli_fname != nullptr;
  found.file = is_known ? info.dli_fname : "unknown";
  runtime = found;
  return true;
}

Runtime find() {
  Runtime runtime;
  void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (torch != nullptr && look_up(torch, runtime)) return runtime;
  if (look_up(RTLD_DEFAULT, runtime)) return runtime;
  void* system = dlopen("libgomp.so.1", RTLD_LAZY);
  if (system != nullptr) look_up(system, runtime);
  return runtime;
}

const Runtime& runtime() {
  static const Runtime found = find();
  return found;
}

/// What the threads of one call have in common.
struct Work {
  int count;
  void (*call)(const void*, int);
  const void* body;
};

/// Of one thread. A runtime may give fewer than were asked for.
void run_share(void* argument) {
  const Work& work = *static_cast<const Work*>(argument);
  for (int index = runtime().thread_number(); index < work.count; index += runtime().num_threads())
    work.call(work.body, index);
}

} // namespace

const std::string& openmp_library() {
  return runtime().file;
}

void run_parallel(int count, void (*call)(const void*, int), const void* body) {
  Work work{count, call, body};
  if (runtime().parallel != nullptr) return runtime().parallel(run_share, &work, static_cast<unsigned>(count), 0);
  for (int index = 0; index < count; ++index)
    call(body, index);
}

} // namespace zeroopt::cpu
