// The board's own source under Relacy, which lets threads take turns, and loads see older values, in ways that C++'s
// memory model allows and no x86-64 ever shows. Compiled with a board of two tickets, so that they are soon
// overwritten, and without access control.
//
//     board_model ITERATIONS    exits with 1 where a thread has seen what it must not, or sleeps for ever
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <new>
#include <stdexcept>
#include <system_error>
#include <vector>

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <relacy/relacy.hpp>

// What its headers have made of C++'s and C's own names.
#undef memory_order_relaxed
#undef memory_order_acquire
#undef memory_order_release
#undef memory_order_seq_cst
#undef new
#undef delete
#undef malloc
#undef free
#undef errno
#define errno (*__errno_location())

namespace std {

/// std::atomic as far as the board uses it.
template <class T> class model_atomic {
public:
  static constexpr bool is_always_lock_free = true;

  model_atomic() { value_.store(0, rl::mo_relaxed, RL_INFO); }
  T load(memory_order order = memory_order_seq_cst) const { return value_.load(of(order), RL_INFO); }
  void store(T value, memory_order order = memory_order_seq_cst) { value_.store(value, of(order), RL_INFO); }
  T exchange(T value) { return value_.rmw(rl::rmw_type_t<rl::rmw_type_swap>(), value, rl::mo_seq_cst, RL_INFO); }
  T fetch_add(T value, memory_order order = memory_order_seq_cst) {
    return value_.rmw(rl::rmw_type_t<rl::rmw_type_add>(), value, of(order), RL_INFO);
  }
  T fetch_sub(T value, memory_order order = memory_order_seq_cst) {
    return value_.rmw(rl::rmw_type_t<rl::rmw_type_sub>(), value, of(order), RL_INFO);
  }

  /// A futex, which never gives up: who is not woken is found to sleep for ever.
  void sleep_while(T value) {
    rl::context& context = rl::ctx();
    context.sched();
    context.atomic_thread_fence_seq_cst();
    T now;
    {
      rl::preemption_disabler held(context); // the kernel looks and falls asleep under a lock that wakers take
      now = value_.load(rl::mo_acquire, RL_INFO);
    }
    if (now == value) value_.wait(context, false, false, RL_INFO);
  }
  void wake_all() {
    rl::context& context = rl::ctx();
    context.sched();
    context.atomic_thread_fence_seq_cst();
    value_.wake(context, 1 << 20, RL_INFO);
  }

private:
  static rl::memory_order of(memory_order order) {
    switch (order) {
    case memory_order_relaxed:
      return rl::mo_relaxed;
    case memory_order_acquire:
      return rl::mo_acquire;
    case memory_order_release:
      return rl::mo_release;
    default:
      return rl::mo_seq_cst;
    }
  }

  rl::atomic<T> value_;
};

namespace chrono {
/// Each look at it takes ten microseconds: who spins soon sleeps, and nobody's patience ends.
struct model_clock : steady_clock {
  static time_point now() {
    static time_point time;
    return time += microseconds(10);
  }
};
} // namespace chrono
} // namespace std

namespace {

void model_syscall(int, uint32_t* address, int operation, uint32_t value, const timespec*, std::nullptr_t, int) {
  auto* const word = reinterpret_cast<std::model_atomic<uint32_t>*>(address);
  if (operation == FUTEX_WAIT)
    word->sleep_while(value);
  else
    word->wake_all();
}

void model_syscall(int number, uint32_t* address, int operation, int value, std::nullptr_t, std::nullptr_t, int) {
  model_syscall(number, address, operation, static_cast<uint32_t>(value), static_cast<const timespec*>(nullptr),
                nullptr, 0);
}

} // namespace

#define atomic model_atomic
#define steady_clock model_clock
#define syscall model_syscall
#include "cpu/shm_board.cpp"
#undef atomic
#undef steady_clock
#undef syscall

using zeroopt::ShmBoard;
using zeroopt::Ticket;

namespace {

constexpr int64_t kRanks = 2;
constexpr int64_t kTickets = 2 * ShmBoard::kCapacity + 1;
constexpr double kSeconds = 1e6;

Ticket ticket(int64_t number) {
  return {number + 1, 3 * number + 1, 5 * number + 1};
}

bool is_ticket(const Ticket& got, int64_t number) {
  const Ticket expected = ticket(number);
  return got.kind == expected.kind && got.bytes == expected.bytes && got.buffer == expected.buffer;
}

/// Two ranks, and a third that looks and waits for nobody.
struct Model : rl::test_suite<Model, 3> {
  void* memory;
  rl::var<int64_t> buffers[kRanks]; // plain memory: a race on it is found

  void before() {
    memory = std::aligned_alloc(64, static_cast<size_t>(ShmBoard::bytes(kRanks) + 63) / 64 * 64);
    new (memory) ShmBoard::Head();
    ShmBoard board(memory, 0, kRanks);
    for (int64_t rank = 0; rank < kRanks; ++rank) {
      new (board.lanes_ + rank) ShmBoard::Lane();
      buffers[rank](RL_INFO) = int64_t{0};
    }
  }

  void after() {
    ShmBoard board(memory, 0, kRanks);
    for (int64_t rank = 0; rank < kRanks; ++rank)
      board.lanes_[rank].~Lane();
    board.head_->~Head();
    std::free(memory);
  }

  void thread(unsigned index) {
    if (index < kRanks)
      train(index);
    else
      look();
  }

  void train(int64_t rank) {
    ShmBoard board(memory, rank, kRanks);
    for (int64_t number = 0; number < kTickets; ++number) {
      RL_ASSERT(board.wait(ShmBoard::kNever, number, kSeconds));
      buffers[rank](RL_INFO) = number + rank;
      RL_ASSERT(board.post(ticket(number)) == number);
      RL_ASSERT(board.wait(number + 1, ShmBoard::kNever, kSeconds));
      for (int64_t peer = 0; peer < kRanks; ++peer) {
        RL_ASSERT(is_ticket(board.ticket(peer, number), number));
        RL_ASSERT(static_cast<int64_t>(buffers[peer](RL_INFO)) == number + peer);
      }
      board.mark_read(number + 1);
    }
  }

  /// What it reads counts where the rank had not posted a later ticket of that place afterwards.
  void look() {
    ShmBoard board(memory, 0, kRanks);
    for (int turn = 0; turn < 60; ++turn) {
      const int64_t number = board.posted()[0] - 1;
      if (number + 1 == kTickets) break;
      if (number < 0) continue;
      const Ticket got = board.ticket(0, number);
      if (board.posted()[0] < number + ShmBoard::kCapacity) RL_ASSERT(is_ticket(got, number));
    }
  }
};

} // namespace

int main(int, char** arguments) {
  rl::test_params params;
  params.search_type = rl::random_scheduler_type;
  params.iteration_count = static_cast<rl::iteration_t>(std::atoll(arguments[1]));
  params.execution_depth_limit = 100000;
  return rl::simulate<Model>(params) ? 0 : 1;
}
