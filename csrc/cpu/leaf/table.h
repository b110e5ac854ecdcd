// The leaf functions of one instruction set: plain loops over plain pointers, on one thread.
//
// csrc/cpu/leaf is compiled once per instruction set into zeroopt::cpu::ZEROOPT_ISA, and nothing in it may be shared
// with other objects: no standard library templates, no inline functions but the always inlined ones, no static
// constructors. Else the linker could merge, say, an AVX-512 copy of std::min into code that runs on every machine.
#pragma once

#include "common/philox.h"
#include "kernels.h"
#include "ops/all.h"

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

/// Codes and steps of elements [0, numel), which begin with a block; see common/wire_code.h. residual: bfloat16, or
/// null.
using WireEncodeLeaf = void (*)(const void* values, uint16_t* residual, int64_t numel, uint8_t* codes, float* steps,
                                const NoiseKey& key, uint64_t first_call);

/// out[i] = cast(base[i] + tree over the values of slices[...][i]) for the elements of blocks [first, last); base may
/// be null. numel: of a slice.
using WireSumLeaf = void (*)(const uint8_t* const* slices, int64_t num_slices, const void* base, void* out,
                             int64_t numel, int64_t first, int64_t last);

/// One step over elements [0, numel) of float32 arrays. states: [kMaxStates], those in use. update: written by ops with
/// kSumsSquares, else not used; as is grad by ops without kReadsGrad.
template <class Op>
using StepLeaf = void (*)(const typename Op::Scalars& scalars, float* param, const float* grad, float* const* states,
                          float* update, int64_t numel);

struct PackTable {
  PackLeaf leaf[kNumDTypes][kNumDTypes]; ///< [src dtype][dst dtype]
};

struct ReduceTable {
  ReduceLeaf leaf[kNumDTypes][kNumDTypes]; ///< [slice dtype][out dtype]; null where there is none
};

/// Formats of parameters and moments. random: 16 bits an element.
struct FormatTable {
  /// bits[2 * i] and bits[2 * i + 1]: the 128 bits of call first_call + i, see common/philox.h
  void (*draw_noise)(const NoiseKey& key, uint64_t first_call, int64_t calls, uint64_t* bits);
  void (*round_ties_away)(const float* values, uint16_t* rounded, int64_t numel);
  void (*round_stochastic)(const float* values, const uint16_t* random, uint16_t* rounded, int64_t numel);
  void (*split)(const float* values, uint16_t* rounded, uint16_t* remainders, int64_t numel);
  void (*join)(const uint16_t* rounded, const uint16_t* remainders, float* values, int64_t numel);
  void (*encode_signed)(const float* values, uint8_t* codes, float* scales, int64_t numel);
  /// random: null to round to nearest
  void (*encode_unsigned)(const float* values, const uint16_t* random, uint8_t* codes, float* scales, int64_t numel);
  void (*decode[2])(const uint8_t* codes, const float* scales, float* values, int64_t numel); ///< [is_signed]
};

/// What travels. [dtype][8 bits rather than 4]; null where there is none.
struct WireTable {
  WireEncodeLeaf encode[kNumDTypes][2];
  WireSumLeaf sum[kNumDTypes][2];
};

/// The leaves of one op.
template <class Op> struct OpLeaves {
  StepLeaf<Op> leaf[1 << kMaxStates]; ///< [the states in use, as bits]; null where no group uses just these
};

template <class List> struct OpTable;
template <class... Ops> struct OpTable<OpList<Ops...>> : OpLeaves<Ops>... {};
using StepTable = OpTable<AllOps>;

struct LeafTable {
  const PackTable* pack;
  const ReduceTable* reduce;
  CopyLeaf copy;
  const FormatTable* formats;
  const WireTable* wire;
  double (*sum_squares)(const float* values, int64_t numel);
  /// Adds to sums.
  void (*sum_in_parts)(const float* values, int64_t numel, double scale, bool squared, const double* rounders,
                       double* sums);
  const StepTable* steps;
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
extern const FormatTable format_table;
extern const WireTable wire_table;
extern const StepTable step_table;
extern const LeafTable leaf_table;
void copy(const void* src, void* dst, int64_t bytes);
double sum_squares(const float* values, int64_t numel);
void sum_in_parts(const float* values, int64_t numel, double scale, bool squared, const double* rounders, double* sums);
} // namespace zeroopt::cpu::ZEROOPT_ISA
#endif
