// The threads of a block as fibers that take turns, each with its own stack.
#include "cuda_runtime.h"

#undef _FORTIFY_SOURCE // whose longjmp takes another stack for a mistake
#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace cuda_on_cpu {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr unsigned kWarp = 32;

enum class State { ready, at_barrier, at_shuffle, finished };

/// Made once, and kept for all launches: it then switches without a call of the system.
struct Fiber {
  std::unique_ptr<char[]> stack;
  jmp_buf place;           ///< where it goes on
  bool is_running = false; ///< it has begun with a kernel, and not come to its end
  bool is_made = false;
  State state;
  int line; ///< of the barrier or shuffle it waits at
  // of the shuffle:
  unsigned mask;
  unsigned source;
  uint64_t value;
  uint64_t result;
};

std::vector<Fiber> fibers; // those that there are
unsigned num_running;      // of the block that runs
jmp_buf scheduler;
std::string fault; // what a thread did that a GPU would refuse
const std::function<void()>* running_kernel;

Fiber& current() {
  return fibers[threadIdx.x];
}

void pause(State state, int line) {
  Fiber& fiber = current();
  fiber.state = state;
  fiber.line = line;
  if (_setjmp(fiber.place) == 0) _longjmp(scheduler, 1);
}

void run_fiber() {
  for (;;) {
    current().is_running = true;
    (*running_kernel)();
    current().is_running = false;
    pause(State::finished, 0);
  }
}

/// Switches to a fiber until it pauses.
void resume(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.is_made) _longjmp(fiber.place, 1);
  fiber.is_made = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStackBytes;
  makecontext(&context, run_fiber, 0);
  setcontext(&context);
}

void start(unsigned thread) {
  Fiber& fiber = fibers[thread];
  fiber.state = State::ready;
  if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStackBytes);
  if (fiber.is_running) fiber.is_made = false; // it was left where it did what a GPU would refuse
  fiber.is_running = false;
}

/// Lets every thread that can go on run until it waits; says whether there was one.
bool run_ready() {
  const unsigned count = num_running;
  bool any = false;
  for (unsigned turn = 0; turn < count; ++turn) {
    threadIdx.x = reverse_order ? count - 1 - turn : turn;
    if (current().state != State::ready) continue;
    any = true;
    resume(current());
    if (!fault.empty()) throw std::logic_error(fault);
  }
  return any;
}

std::string name_of(unsigned thread) {
  const Fiber& fiber = fibers[thread];
  const std::string name = "thread " + std::to_string(thread);
  const std::string line = std::to_string(fiber.line);
  if (fiber.state == State::at_barrier) return name + " at the barrier of line " + line;
  if (fiber.state == State::at_shuffle) return name + " at the shuffle of line " + line;
  return name + ", which has finished";
}

[[noreturn]] void diverged(unsigned thread, unsigned other) {
  throw std::logic_error("block " + std::to_string(blockIdx.x) + ": " + name_of(thread) + " waits for " +
                         name_of(other));
}

/// Throws unless the lane that `thread` waits for in its shuffle waits in the same one.
void check_lane(unsigned thread, unsigned other) {
  if (other >= num_running) throw std::logic_error("a shuffle's mask names lanes that the block does not have");
  const Fiber& a = fibers[thread];
  const Fiber& b = fibers[other];
  if (b.state != State::at_shuffle || b.mask != a.mask || b.line != a.line) diverged(thread, other);
}

/// Gives the lanes that wait in shuffles what they asked for; says whether there were any.
bool finish_shuffles() {
  bool any = false;
  for (unsigned thread = 0; thread < num_running; ++thread) {
    Fiber& fiber = fibers[thread];
    if (fiber.state != State::at_shuffle) continue;
    any = true;
    const unsigned first_lane = thread / kWarp * kWarp;
    for (unsigned lane = 0; lane < kWarp; ++lane)
      if (fiber.mask >> lane & 1u) check_lane(thread, first_lane + lane);
    if ((fiber.mask >> (thread % kWarp) & fiber.mask >> fiber.source & 1u) == 0)
      throw std::logic_error("a shuffle reads from or to a lane that its mask leaves out");
    fiber.result = fibers[first_lane + fiber.source].value;
  }
  for (unsigned thread = 0; thread < num_running; ++thread)
    if (fibers[thread].state == State::at_shuffle) fibers[thread].state = State::ready;
  return any;
}

/// Lets the threads go on that wait at a barrier, which all must have reached; says whether there were any.
bool finish_barrier() {
  unsigned waiting = 0;
  while (waiting < num_running && fibers[waiting].state != State::at_barrier)
    ++waiting;
  if (waiting == num_running) return false;
  for (unsigned thread = 0; thread < num_running; ++thread)
    if (fibers[thread].state != State::at_barrier || fibers[thread].line != fibers[waiting].line)
      diverged(waiting, thread);
  for (unsigned thread = 0; thread < num_running; ++thread)
    fibers[thread].state = State::ready;
  return true;
}

void run_block() {
  for (unsigned thread = 0; thread < num_running; ++thread)
    start(thread);
  while (run_ready())
    if (!finish_shuffles()) finish_barrier();
}

} // namespace

void barrier(int line) {
  pause(State::at_barrier, line);
}

uint64_t shuffle(unsigned mask, uint64_t value, unsigned source, int line) {
  Fiber& fiber = current();
  fiber.mask = mask;
  fiber.value = value;
  fiber.source = source;
  pause(State::at_shuffle, line);
  return fiber.result;
}

void run_grid(unsigned num_blocks, unsigned num_threads, const std::function<void()>& kernel) {
  running_kernel = &kernel;
  fault.clear();
  if (fibers.size() < num_threads) fibers.resize(num_threads);
  num_running = num_threads;
  blockDim = dim3(num_threads);
  gridDim = dim3(num_blocks);
  for (unsigned turn = 0; turn < num_blocks; ++turn) {
    blockIdx.x = reverse_order ? num_blocks - 1 - turn : turn;
    run_block();
  }
}

} // namespace cuda_on_cpu

// The kernels are compiled with -fsanitize=alignment, whose library this function stands for: a vector that does not
// lie at a multiple of its size is an error on a GPU. The thread never goes on.
extern "C" void __ubsan_handle_type_mismatch_v1(void*, void* address) {
  using namespace cuda_on_cpu;
  fault = "block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x) +
          ": a vector at an address that is " + std::to_string(reinterpret_cast<uintptr_t>(address) % 16) +
          " after a multiple of 16";
  pause(State::finished, 0);
}
