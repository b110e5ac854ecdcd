// The leaf functions of one instruction set: plain loops over plain pointers, on one thread.
//
// csrc/cpu/leaf is compiled once per instruction set into zeroopt::cpu::ZEROOPT_ISA, and nothing in it may be shared
// with other objects: no standard library templates, no inline functions but the always inlined ones, no static
// constructors. Else the linker could merge, say, an AVX-512 copy of std::min into code that runs on every machine.
#pragma once

#include "kernels.h"
#include "ops/adamw.h"
#include "ops/sgd.h"

namespace zeroopt::cpu {

constexpr int kNumDTypes = 4;

/// dst[i] = cast(src[i] * scale) for i in [0, numel); dst may be src.
using PackLeaf = void (*)(const void* src, void* dst, int64_t numel, double scale);

/// out[i] = cast(base[i] + tree over slices[...][i]) for i in [begin, end), see kernels.h; base may be null, num_slices
/// >= 1.
using ReduceLeaf = void (*)(const void* const* slices, int64_t num_slices, const void* base, void* out, int64_t begin,
                            int64_t end);

/// memcpy, past the cache where there is much to copy.
using CopyLeaf = void (*)(const void* src, void* dst, int64_t bytes);

/// One step over elements [0, numel); max_exp_avg_sq is null without AMSGrad.
using AdamWLeaf = void (*)(const AdamWTensors& tensors, int64_t numel, const AdamWScalars& scalars);

/// One step over elements [0, numel); momentum_buffer is null without momentum.
using SgdLeaf = void (*)(const SgdTensors& tensors, int64_t numel, const SgdScalars& scalars);

struct PackTable {
  PackLeaf leaf[kNumDTypes][kNumDTypes]; ///< [src dtype][dst dtype]
};

struct ReduceTable {
  ReduceLeaf leaf[kNumDTypes][kNumDTypes]; ///< [slice dtype][out dtype]; null where there is none
};

struct LeafTable {
  const PackTable* pack;
  const ReduceTable* reduce;
  CopyLeaf copy;
  AdamWLeaf adamw;
  SgdLeaf sgd;
};

} // namespace zeroopt::cpu

// The loop that follows reads and writes only element i of its arrays in iteration i, so arrays that are one and the
// same need not keep it from being vectorised.
#if defined(__clang__)
#define ZEROOPT_VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define ZEROOPT_VECTORIZE _Pragma("GCC ivdep")
#else
#define ZEROOPT_VECTORIZE
#endif

#ifdef ZEROOPT_ISA
namespace zeroopt::cpu::ZEROOPT_ISA {
extern const PackTable pack_table;
extern const ReduceTable reduce_table;
extern const LeafTable leaf_table;
void copy(const void* src, void* dst, int64_t bytes);
void adamw(const AdamWTensors& tensors, int64_t numel, const AdamWScalars& scalars);
void sgd(const SgdTensors& tensors, int64_t numel, const SgdScalars& scalars);
} // namespace zeroopt::cpu::ZEROOPT_ISA
#endif
