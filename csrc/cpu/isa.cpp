#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>

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

namespace {

Isa choose() {
  const std::vector<Isa>& isas = compiled_isas();
  const char* name = std::getenv("ZEROOPT_CPU_ISA");
  if (name == nullptr || *name == '\0') {
    size_t widest = isas.size() - 1;
    while (!isas[widest].supported())
      --widest; // generic always is
    return isas[widest];
  }
  std::string names;
  for (const Isa& candidate : isas) {
    if (std::string(name) != candidate.name) {
      names += (names.empty() ? "" : ", ") + std::string(candidate.name);
      continue;
    }
    if (candidate.supported()) return candidate;
    throw std::runtime_error("ZEROOPT_CPU_ISA=" + std::string(name) + ": this processor does not support it; unset it");
  }
  throw std::runtime_error("ZEROOPT_CPU_ISA=" + std::string(name) + " is not in this build, which has " + names);
}

} // namespace

const std::vector<Isa>& compiled_isas() {
  static const std::vector<Isa> isas = {
      {"generic", &generic::leaf_table, [] { return true; }},
// __builtin_cpu_supports also asks whether the operating system saves the wide registers.
#ifdef ZEROOPT_HAS_AVX2
      {"avx2", &avx2::leaf_table, [] { return __builtin_cpu_supports("avx2") != 0; }},
#endif
#ifdef ZEROOPT_HAS_AVX512
      {"avx512", &avx512::leaf_table,
       [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
       }},
#endif
  };
  return isas;
}

const Isa& isa() {
  static const Isa chosen = choose();
  return chosen;
}

} // namespace zeroopt::cpu
