// Random numbers for stochastic rounding: Philox4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
// 3") with 7 rounds, the fewest that pass the BigCrush tests there.
//
// A number depends only on the seed, the step, the parameter, the array and the element, so it is the same on every
// device and for every number of threads, ranks and buckets. One call gives 128 bits, 16 for each of 8 elements:
//
//   counter   element / 8 (60 bits), array (4 bits), parameter (32), step (32, modulo 2^32)
//   key       seed (64)
//   result    word 0: elements 0 (low half) and 1, word 1: 2 and 3, word 2: 4 and 5, word 3: 6 and 7
#pragma once

#include <stdint.h>

#include "common/host_device.h"

namespace zeroopt {

constexpr int kNoisePerCall = 8; // elements

/// Whose random numbers: all of a segment's but the element.
struct NoiseKey {
  uint64_t seed;
  uint32_t step;
  uint32_t param;
  uint32_t array; ///< 0: the parameter itself, 1 + k: state k
};

/// Four words of 32 bits. Word is uint32_t, or uint64_t with anything in its upper half: the vector units of CPUs
/// multiply 32 bits in lanes of 64.
template <class Word> struct PhiloxWords {
  Word word[4];
};

template <int rounds, class Word>
ZEROOPT_INLINE PhiloxWords<Word> philox4x32(PhiloxWords<Word> counter, uint32_t key0, uint32_t key1) {
  Word x0 = counter.word[0], x1 = counter.word[1], x2 = counter.word[2], x3 = counter.word[3];
  for (int round = 0; round < rounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(x0 & 0xffffffffu) * 0xD2511F53u;
    const uint64_t product1 = static_cast<uint64_t>(x2 & 0xffffffffu) * 0xCD9E8D57u;
    x0 = static_cast<Word>(product1 >> 32) ^ x1 ^ key0;
    x1 = static_cast<Word>(product1);
    x2 = static_cast<Word>(product0 >> 32) ^ x3 ^ key1;
    x3 = static_cast<Word>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{x0, x1, x2, x3}};
}

/// The 128 bits of elements [8 * call, 8 * call + 8).
template <class Word> ZEROOPT_INLINE PhiloxWords<Word> noise(const NoiseKey& key, uint64_t call) {
  const PhiloxWords<Word> counter = {{static_cast<Word>(call),
                                      static_cast<Word>(call >> 32 | static_cast<uint64_t>(key.array) << 28), key.param,
                                      key.step}};
  return philox4x32<7>(counter, static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32));
}

/// The 16 bits of one of the 8 elements.
ZEROOPT_INLINE uint32_t noise_of(const PhiloxWords<uint32_t>& words, int element) {
  return words.word[element / 2] >> (element % 2 * 16) & 0xffffu;
}

} // namespace zeroopt
