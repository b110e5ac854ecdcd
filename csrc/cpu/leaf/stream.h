// Stores that go past the cache. A plain store first reads the line that it writes to; for data that does not stay in
// the cache anyway, that is a third of the traffic of a copy.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"
#include "cpu/cache_line.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace zeroopt::cpu::ZEROOPT_ISA {

constexpr int64_t kStreamBytes = 1 << 20; // from here on; what is smaller may well be read from the cache soon

#if defined(__SSE2__)

constexpr int64_t kLineBytes = kCacheLineBytes;
constexpr int64_t kPrefetchBytes = 4096; // the processor's own prefetcher does not cross pages

/// One aligned line. src need not be aligned.
ZEROOPT_INLINE void stream_line(char* dst, const char* src) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(dst), _mm512_loadu_si512(src));
#elif defined(__AVX__)
  for (int64_t i = 0; i < kLineBytes; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i)));
#else
  for (int64_t i = 0; i < kLineBytes; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(dst + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i)));
#endif
}

/// memcpy past the cache. `finish_stream` must follow before anyone else is told of the data.
ZEROOPT_INLINE void stream(void* dst, const void* src, int64_t bytes) {
  char* to = static_cast<char*>(dst);
  const char* from = static_cast<const char*>(src);
  int64_t head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) % kLineBytes);
  if (head > bytes) head = bytes;
  memcpy(to, from, static_cast<size_t>(head));
  int64_t i = head;
  for (; i + kLineBytes <= bytes; i += kLineBytes) {
    _mm_prefetch(from + i + kPrefetchBytes, _MM_HINT_T0);
    stream_line(to + i, from + i);
  }
  memcpy(to + i, from + i, static_cast<size_t>(bytes - i));
}

ZEROOPT_INLINE void finish_stream() {
  _mm_sfence();
}

#else

// Arm's servers (Neoverse, and Cortex-A before it) notice themselves that whole lines are being written, and stop
// reading them: a plain copy already is what was to be had.
ZEROOPT_INLINE void stream(void* dst, const void* src, int64_t bytes) {
  memcpy(dst, src, static_cast<size_t>(bytes));
}

ZEROOPT_INLINE void finish_stream() {}

#endif

} // namespace zeroopt::cpu::ZEROOPT_ISA
