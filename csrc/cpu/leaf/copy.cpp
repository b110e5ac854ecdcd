// copy: bytes, past the cache where there are many. bytes: 2 a byte.
#include "cpu/leaf/table.h"

#include "cpu/leaf/stream.h"

namespace zeroopt::cpu::ZEROOPT_ISA {

void copy(const void* src, void* dst, int64_t bytes) {
  if (bytes == 0) return; // of no bytes there may be no address either, which memcpy must not be given
  if (bytes < kStreamBytes) {
    memcpy(dst, src, static_cast<size_t>(bytes));
    return;
  }
  stream(dst, src, bytes);
  finish_stream();
}

} // namespace zeroopt::cpu::ZEROOPT_ISA
