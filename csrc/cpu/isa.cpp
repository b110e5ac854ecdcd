#include "cpu/isa.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#ifdef ZEROOPT_HAS_SVE
#include <sys/auxv.h>
#include <sys/prctl.h>
#endif

namespace zeroopt::cpu {

namespace generic {
extern const LeafTable leaf_table;
}
#ifdef ZEROOPT_HAS_AVX2
namespace avx2 {
extern const LeafTable leaf_table;
}
#endif
#ifdef ZEROOPT_HAS_AVX512
namespace avx512 {
extern const LeafTable leaf_table;
}
#endif
#ifdef ZEROOPT_HAS_SVE
namespace sve {
extern const LeafTable leaf_table;
}
#endif

namespace {

// What every processor of the kind has: SSE2, or NEON. One that has neither counts in words.
#if defined(__SSE2__) || defined(__ARM_NEON)
constexpr int kGenericBytes = 16;
#else
constexpr int kGenericBytes = sizeof(void*);
#endif

#ifdef ZEROOPT_HAS_SVE
int sve_bytes() {
  // Linux has them since 4.15; headers of old C libraries lack HWCAP_SVE, PR_SVE_GET_VL and PR_SVE_VL_LEN_MASK.
  constexpr unsigned long kHasSve = 1ul << 22;
  constexpr int kGetVectorLength = 51, kLengthMask = 0xffff;
  if ((getauxval(AT_HWCAP) & kHasSve) == 0) return 0;
  const int length = prctl(kGetVectorLength);
  return length < 0 ? 0 : length & kLengthMask;
}
#endif

Isa choose() {
  const std::vector<Isa>& isas = compiled_isas();
  const char* name = std::getenv("ZEROOPT_CPU_ISA");
  if (name == nullptr || *name == '\0') {
    // SVE of 16 bytes computes what NEON does, and predicates besides: equally long is not better.
    const auto is_shorter = [](const Isa& a, const Isa& b) { return a.vector_bytes() < b.vector_bytes(); };
    return *std::max_element(isas.begin(), isas.end(), is_shorter);
  }
  std::string names;
  for (const Isa& candidate : isas) {
    if (std::string(name) != candidate.name) {
      names += (names.empty() ? "" : ", ") + std::string(candidate.name);
      continue;
    }
    if (candidate.vector_bytes() > 0) return candidate;
    throw std::runtime_error("ZEROOPT_CPU_ISA=" + std::string(name) + ": this processor does not support it; unset it");
  }
  throw std::runtime_error("ZEROOPT_CPU_ISA=" + std::string(name) + " is not in this build, which has " + names);
}

} // namespace

const std::vector<Isa>& compiled_isas() {
  static const std::vector<Isa> isas = {
      {"generic", &generic::leaf_table, [] { return kGenericBytes; }},
// __builtin_cpu_supports also asks whether the operating system saves the wide registers.
#ifdef ZEROOPT_HAS_AVX2
      {"avx2", &avx2::leaf_table, [] { return __builtin_cpu_supports("avx2") ? 32 : 0; }},
#endif
#ifdef ZEROOPT_HAS_AVX512
      {"avx512", &avx512::leaf_table,
       [] {
         const bool has_all = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
         return has_all ? 64 : 0;
       }},
#endif
#ifdef ZEROOPT_HAS_SVE
      {"sve", &sve::leaf_table, sve_bytes},
#endif
  };
  return isas;
}

const Isa& isa() {
  static const Isa chosen = choose();
  return chosen;
}

} // namespace zeroopt::cpu
