#include "cpu/shm_board.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <stdexcept>
#include <system_error>

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "cpu/cache_line.h"

namespace zeroopt {
namespace {

using Clock = std::chrono::steady_clock;

static_assert(std::atomic<int64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free,
              "locks inside atomics would not be shared between processes");

// Peers are usually microseconds apart or milliseconds; in the second case another rank may need this core.
constexpr auto kSpin = std::chrono::microseconds(5);

/// Sleeps while *word is `value`, at most for `duration`. May return early.
void sleep_on(std::atomic<uint32_t>& word, uint32_t value, Clock::duration duration) {
  const auto nanoseconds = std::chrono::duration_cast<std::chrono::nanoseconds>(duration).count();
  const timespec timeout = {static_cast<time_t>(nanoseconds / 1000000000), static_cast<long>(nanoseconds % 1000000000)};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, value, &timeout, nullptr, 0);
}

void wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}

} // namespace

/// How many ranks have come to the tickets that stand in one place, one after the other. It is never set back: a rank
/// comes to the next ticket of the place when all have read the one before.
struct ShmBoard::Count {
  std::atomic<int64_t> posted;
  std::atomic<int64_t> read;
};

struct alignas(kCacheLineBytes) ShmBoard::Head {
  std::atomic<uint32_t> bell;
  std::atomic<uint32_t> sleepers; // stays too high when a sleeper is killed, which costs others a system call
  std::atomic<uint32_t> left;     // ranks
  Count counts[kCapacity];        // that of ticket n at n % kCapacity
};

/// A ticket that may be read while its owner writes another one in its place. Who has read anything of the new one then
/// finds `posted` where it was before that was written: each store is behind it, and each load before the next one.
struct ShmBoard::Entry {
  std::atomic<int64_t> kind;
  std::atomic<int64_t> bytes;
  std::atomic<int64_t> buffer;

  void store(const Ticket& ticket) {
    kind.store(ticket.kind, std::memory_order_release);
    bytes.store(ticket.bytes, std::memory_order_release);
    buffer.store(ticket.buffer, std::memory_order_release);
  }

  Ticket load() const {
    return {kind.load(std::memory_order_acquire), bytes.load(std::memory_order_acquire),
            buffer.load(std::memory_order_acquire)};
  }
};

struct alignas(kCacheLineBytes) ShmBoard::Lane {
  std::atomic<int64_t> posted;
  std::atomic<int64_t> read;
  std::atomic<uint32_t> left;
  Entry tickets[kCapacity]; // that of number n at n % kCapacity
};

int64_t ShmBoard::bytes(int64_t world_size) {
  return static_cast<int64_t>(sizeof(Head)) + world_size * static_cast<int64_t>(sizeof(Lane));
}

// Zeroed memory is a valid board: atomics of integers are the integers.
ShmBoard::ShmBoard(void* memory, int64_t rank, int64_t world_size)
    : head_(static_cast<Head*>(memory)), lanes_(reinterpret_cast<Lane*>(static_cast<char*>(memory) + sizeof(Head))),
      rank_(rank), world_size_(world_size) {
  if (rank < 0 || rank >= world_size) throw std::invalid_argument("expected a rank below world_size");
}

int64_t ShmBoard::post(const Ticket& ticket) {
  const int64_t number = lane(rank_).posted.load(std::memory_order_relaxed);
  if (!all_have_read(number - kCapacity + 1))
    throw std::logic_error("ShmBoard::post: a ticket that is still to be read would be overwritten");
  lane(rank_).tickets[number % kCapacity].store(ticket);
  // Counted first: for want of a rank that was killed in between, which would seem to have posted, nobody must wait.
  const bool is_last = adds_last(count_of(number).posted, number);
  lane(rank_).posted.store(number + 1, std::memory_order_release);
  if (is_last) ring();
  return number;
}

void ShmBoard::mark_read(int64_t count) {
  bool is_last = false;
  for (int64_t number = lane(rank_).read.load(std::memory_order_relaxed); number < count; ++number)
    is_last = adds_last(count_of(number).read, number) || is_last;
  lane(rank_).read.store(count, std::memory_order_release);
  if (is_last) ring();
}

void ShmBoard::leave() {
  if (lane(rank_).left.exchange(1) == 0) head_->left.fetch_add(1);
  ring();
}

ShmBoard::Progress ShmBoard::progress(int64_t posted_count, int64_t read_count) const {
  // Asked before the counts: what a rank did before it left counts.
  const bool some_left = head_->left.load() != 0;
  if (all_have_posted(posted_count) || all_have_read(read_count)) return Progress::made;
  if (!some_left) return Progress::missing;
  bool posts_lost = false, reads_lost = false;
  for (int64_t peer = 0; peer < world_size_; ++peer) {
    if (lane(peer).left.load(std::memory_order_acquire) == 0) continue;
    posts_lost = posts_lost || lane(peer).posted.load(std::memory_order_acquire) < posted_count;
    reads_lost = reads_lost || lane(peer).read.load(std::memory_order_acquire) < read_count;
  }
  return posts_lost && reads_lost ? Progress::impossible : Progress::missing;
}

bool ShmBoard::all_have_posted(int64_t count) const {
  if (count <= 0 || count == kNever) return count != kNever;
  return count_of(count - 1).posted.load(std::memory_order_acquire) >= full_count(count - 1);
}

bool ShmBoard::all_have_read(int64_t count) const {
  if (count <= 0 || count == kNever) return count != kNever;
  return count_of(count - 1).read.load(std::memory_order_acquire) >= full_count(count - 1);
}

bool ShmBoard::adds_last(std::atomic<int64_t>& count, int64_t number) {
  return count.fetch_add(1) + 1 ==
         full_count(number); // behind what this rank has written, and before `sleepers` is read
}

/// The count at the place of a ticket when all ranks have come to it.
int64_t ShmBoard::full_count(int64_t number) const {
  return world_size_ * (number / kCapacity + 1);
}

ShmBoard::Count& ShmBoard::count_of(int64_t number) const {
  return head_->counts[number % kCapacity];
}

bool ShmBoard::wait(int64_t posted_count, int64_t read_count, double seconds) {
  const auto begin = Clock::now();
  const auto end = begin + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  auto now = begin;
  do {
    const Progress state = progress(posted_count, read_count);
    if (state != Progress::missing) return state == Progress::made;
    now = Clock::now();
  } while (now < std::min(end, begin + kSpin));

  while (now < end) {
    head_->sleepers.fetch_add(1); // sequentially consistent with `ring`: one of the two sees the other
    const uint32_t bell = head_->bell.load();
    const Progress state = progress(posted_count, read_count);
    if (state == Progress::missing) sleep_on(head_->bell, bell, end - now);
    head_->sleepers.fetch_sub(1);
    if (state != Progress::missing) return state == Progress::made;
    now = Clock::now();
  }
  return false;
}

void ShmBoard::ring() {
  head_->bell.fetch_add(1);
  if (head_->sleepers.load() != 0) wake_all(head_->bell);
}

std::vector<int64_t> ShmBoard::posted() const {
  std::vector<int64_t> counts;
  for (int64_t peer = 0; peer < world_size_; ++peer)
    counts.push_back(lane(peer).posted.load(std::memory_order_acquire));
  return counts;
}

std::vector<int64_t> ShmBoard::read() const {
  std::vector<int64_t> counts;
  for (int64_t peer = 0; peer < world_size_; ++peer)
    counts.push_back(lane(peer).read.load(std::memory_order_acquire));
  return counts;
}

std::vector<bool> ShmBoard::left() const {
  std::vector<bool> flags;
  for (int64_t peer = 0; peer < world_size_; ++peer)
    flags.push_back(lane(peer).left.load(std::memory_order_acquire) != 0);
  return flags;
}

Ticket ShmBoard::ticket(int64_t rank, int64_t number) const {
  return lane(rank).tickets[number % kCapacity].load();
}

ShmBoard::Lane& ShmBoard::lane(int64_t rank) const {
  return lanes_[rank];
}

namespace {

struct flock byte_lock(int64_t rank) {
  struct flock lock = {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = rank;
  lock.l_len = 1;
  return lock;
}

} // namespace

void hold_rank_lock(int fd, int64_t rank) {
  struct flock lock = byte_lock(rank);
  if (fcntl(fd, F_SETLK, &lock) != 0)
    throw std::system_error(errno, std::generic_category(), "cannot lock shared memory");
}

bool rank_lock_is_held(int fd, int64_t rank) {
  struct flock lock = byte_lock(rank);
  if (fcntl(fd, F_GETLK, &lock) != 0) throw std::system_error(errno, std::generic_category(), "cannot query a lock");
  return lock.l_type != F_UNLCK;
}

} // namespace zeroopt
