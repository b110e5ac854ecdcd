// Ranks as threads on one board, for a ThreadSanitizer: they post, wait and read, and look at tickets that may be
// overwritten meanwhile, as whoever waits for nobody does. Prints nothing; exits with 1 where a ticket is a mixture.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "cpu/shm_board.h"

using zeroopt::ShmBoard;
using zeroopt::Ticket;

namespace {

constexpr int64_t kRanks = 3;
constexpr int64_t kTickets = 20 * ShmBoard::kCapacity;
constexpr double kSeconds = 120.0;

Ticket ticket(int64_t number) {
  return {number, 3 * number, 5 * number};
}

bool is_ticket(const Ticket& got, int64_t number) {
  const Ticket expected = ticket(number);
  return got.kind == expected.kind && got.bytes == expected.bytes && got.buffer == expected.buffer;
}

void expect(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

void train(ShmBoard board, const char* buffers, char* buffer, int64_t rank) {
  for (int64_t number = 0; number < kTickets; ++number) {
    expect(board.wait(ShmBoard::kNever, number - ShmBoard::kCapacity + 1, kSeconds), "nobody has read");
    expect(board.wait(ShmBoard::kNever, number, kSeconds), "a peer still reads the buffer");
    *buffer = static_cast<char>(number + rank);
    expect(board.post(ticket(number)) == number, "a ticket has another number");
    expect(board.wait(number + 1, ShmBoard::kNever, kSeconds), "nobody has posted");
    for (int64_t peer = 0; peer < kRanks; ++peer) {
      expect(is_ticket(board.ticket(peer, number), number), "a ticket is another one");
      expect(buffers[64 * peer] == static_cast<char>(number + peer), "a buffer is of another ticket");
    }
    board.mark_read(number + 1);
  }
  board.leave();
}

/// Waits for nobody: what it reads counts where no rank had posted a later ticket of that place afterwards.
void look(ShmBoard board, const std::atomic<bool>& is_over) {
  while (!is_over.load()) {
    const int64_t number = board.posted()[0] - 1;
    if (number < 0) continue;
    const Ticket got = board.ticket(0, number);
    if (board.posted()[0] < number + ShmBoard::kCapacity) expect(is_ticket(got, number), "a ticket is a mixture");
  }
}

} // namespace

int main() {
  void* const memory = std::aligned_alloc(64, static_cast<size_t>(ShmBoard::bytes(kRanks)));
  for (int64_t i = 0; i < ShmBoard::bytes(kRanks); ++i)
    static_cast<char*>(memory)[i] = 0;
  std::vector<char> buffers(64 * kRanks);
  std::atomic<bool> is_over{false};
  std::thread looking(look, ShmBoard(memory, 0, kRanks), std::cref(is_over));
  std::vector<std::thread> ranks;
  for (int64_t rank = 0; rank < kRanks; ++rank)
    ranks.emplace_back(train, ShmBoard(memory, rank, kRanks), buffers.data(), &buffers[64 * rank], rank);
  for (std::thread& rank : ranks)
    rank.join();
  is_over.store(true);
  looking.join();
  std::free(memory);
  return 0;
}
