// The board on which the ranks of one host tell each other how far they are: counters in shared memory, and a futex to
// sleep on. The buckets themselves lie in shared memory too; who has been told that a bucket is ready reads it there.
//
// Every rank posts the same sequence of tickets, one for each collective, and reads its peers' buckets for one ticket
// after the other. Two counters a rank say it all, so that no rank ever waits for one that it does not need:
//
//   posted   tickets 0 .. posted-1: this rank's input lies ready, peers may read it
//   read     tickets 0 .. read-1: this rank has read what it needs, peers may overwrite their inputs
//
// So that nobody has to look at all ranks, each ticket has a count of those that have posted it, and of those that have
// read it. All ranks sleep on one word, the bell, which the last one to post or to read a ticket rings.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace zeroopt {

/// What a rank says about its part in one collective; ranks that disagree have diverged.
struct Ticket {
  int64_t kind;
  int64_t bytes;  ///< size of the bucket
  int64_t buffer; ///< number of the shared buffer in which this rank's input lies; ranks may differ in it
};

/// One rank's view of the board. Its memory must be zero before the first rank comes, and outlive this object.
class ShmBoard {
public:
  /// Tickets that a rank may be ahead of the slowest reader.
  static constexpr int64_t kCapacity = 256;

  /// Bytes of shared memory, to be aligned to kCacheLineBytes.
  static int64_t bytes(int64_t world_size);

  ShmBoard(void* memory, int64_t rank, int64_t world_size);

  /// Announces that this rank's input for the next ticket is ready, and returns the ticket's number.
  /// @throws std::logic_error when a peer has yet to read the ticket kCapacity before it.
  int64_t post(const Ticket& ticket);

  /// Announces that this rank has read all that it needs for the tickets below `count`.
  void mark_read(int64_t count);

  /// Says that this rank will post no more.
  void leave();

  /// Sleeps until all ranks have posted the tickets below `posted_count`, or all have read those below `read_count`
  /// (`kNever` leaves one of them out).
  /// @return false when `seconds` have gone by, or when ranks have left without which neither can come.
  bool wait(int64_t posted_count, int64_t read_count, double seconds);
  static constexpr int64_t kNever = INT64_MAX;

  std::vector<int64_t> posted() const;
  std::vector<int64_t> read() const;
  std::vector<bool> left() const;

  /// What a rank has posted for a ticket that is not older than kCapacity. Whether it was not, who waits for nobody
  /// asks `posted` afterwards: any part of a newer ticket is found there only once `posted` says so.
  Ticket ticket(int64_t rank, int64_t number) const;

private:
  struct Entry;
  struct Lane;
  struct Count;
  struct Head;

  enum class Progress { missing, made, impossible };
  Progress progress(int64_t posted_count, int64_t read_count) const;
  bool all_have_posted(int64_t count) const;
  bool all_have_read(int64_t count) const;
  bool adds_last(std::atomic<int64_t>& count, int64_t number);
  int64_t full_count(int64_t number) const;
  void ring();
  Count& count_of(int64_t number) const;
  Lane& lane(int64_t rank) const;

  Head* head_;
  Lane* lanes_;
  int64_t rank_;
  int64_t world_size_;
};

/// Holds byte `rank` of an open file locked for as long as this process lives; a lock that is not inherited by fork().
/// Nothing else in the process may open that file, for closing it would let go of the lock.
void hold_rank_lock(int fd, int64_t rank);

/// Whether some other process holds the lock of `rank`.
bool rank_lock_is_held(int fd, int64_t rank);

} // namespace zeroopt
