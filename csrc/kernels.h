// The contract of every kernel. No torch here: addresses, sizes, dtype codes, a thread count or a CUDA stream.
//
// The caller (zeroopt/ops) has checked dtype, device, contiguity, sizes and aliasing; a kernel only computes.
// "bytes" counts what one element moves to and from memory, the cost that matters: every kernel is bound by memory.
// Results do not depend on the thread count or the instruction set (but for which NaN a NaN is): no contraction into
// fused multiply-adds, and sums in a fixed order.
#pragma once

#include <cstdint>
#include <string>

namespace zeroopt {

enum class DType : int32_t { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

/// How a parameter is stored, and in what precision it is kept.
enum class ParamFormat : int32_t {
  float32 = 0,             ///< param: float32
  bfloat16_master = 1,     ///< param: bfloat16, written only; master: float32
  float16_master = 2,      ///< param: float16, written only; master: float32
  bfloat16_remainder = 3,  ///< param: bfloat16; master: the 16 bits that make it an exact float32, see common/dtype.h
  bfloat16_stochastic = 4, ///< param: bfloat16, rounded stochastically; no master
};

/// How moments are stored.
enum class StateFormat : int32_t {
  float32 = 0,
  bfloat16 = 1, ///< rounded stochastically
  int8 = 2, ///< codes and one float32 scale for every kQuantBlock elements; the codes of what cannot be negative are
            ///< rounded stochastically, see common/int8_code.h
};

/// How all segments of a step are stored.
struct Storage {
  ParamFormat param;
  DType grad; ///< float32, bfloat16 or float16
  StateFormat state;
};

constexpr int64_t kQuantBlock = 256; // elements that share a scale, counted from the first element of a segment
constexpr int kMaxStates = 3;        // arrays of state of an optimizer
constexpr int kSumParts = 3;         // into which sum_in_parts cuts a term

/// A piece of one parameter; the row of a table int64[num_segments][13]. The arrays have numel elements each.
struct SegmentRow {
  int64_t numel;             ///< > 0
  int64_t group;             ///< row of the table of hyper-parameters
  int64_t key;               ///< the parameter's number, < 2^32, by which its random numbers differ
  int64_t first;             ///< element of the parameter that the segment begins with: >= 0, < 2^60
  void* param;               ///< in/out, but see ParamFormat
  void* master;              ///< in/out, see ParamFormat
  const void* grad;          ///< in
  void* states[kMaxStates];  ///< in/out; null where the optimizer or the group has no such state
  float* scales[kMaxStates]; ///< in/out, [ceil(numel / kQuantBlock)], with StateFormat::int8
};

/// The segments a step covers, one call for a whole bucket or a whole model.
struct SegmentTable {
  const SegmentRow* rows; ///< [count], in; no two segments overlap
  const uint8_t* active;  ///< [count], in; 0: the parameter had no gradient, nothing of it is touched
  float* steps;           ///< [2][count], in/out; see common/step_count.h; active ones count one more before the update
  double* squares;        ///< [count][2], out or in; for the kernels that say so, else null
  int64_t count;
};

/// What all segments of a step have in common. The scalars lie in memory, so that nobody has to wait to know them.
struct StepControl {
  const float* grad_scale; ///< gradients are divided by it; null: 1
  const float* clip_coef;  ///< and multiplied by it; null: 1
  const float* found_inf;  ///< not 0: the step is skipped, nothing at all is written; null: 0
  uint64_t seed;           ///< of stochastic rounding
};

namespace cpu {

/// dst[i] = cast(src[i] * scale). float32 arithmetic (float64 when either side is). dst may be src itself (same dtype).
/// Packing a gradient into its bucket, and unpacking, with the roles exchanged. bytes: sizeof(src) + sizeof(dst).
void pack(const void* src, DType src_dtype, void* dst, DType dst_dtype, int64_t numel, double scale, int num_threads);

/// pack for many arrays in one call: each active segment's `param` = cast(its `grad` * scale). Nothing else of a row is
/// looked at, `steps` and `squares` neither; `param` need not be anybody's parameter.
void pack_segments(const SegmentTable& segments, DType src_dtype, DType dst_dtype, double scale, int num_threads);

/// out[i] = cast(base[i] + (slices[0][i] + slices[1][i] + ...)), summed in float32 (float64 for float64) as a tree: the
/// sum of n > 1 slices is that of the first p plus that of the others, p the largest power of two below n. So six are
/// ((s0 + s1) + (s2 + s3)) + (s4 + s5). Groups of 2, 4, 8... slices may be summed first, and then their uncast sums,
/// with the same bits. This is pairwise summation, whose error grows with log n only: N. J. Higham, "The accuracy of
/// floating point summation", SIAM J. Sci. Comput. 14(4), 1993.
/// base: null, or dtype and size of out. out may be base or one of the slices (then of its dtype).
/// bytes: num_slices * sizeof(slice) + sizeof(out) * (base ? 2 : 1).
void reduce(const void* const* slices, int64_t num_slices, DType slice_dtype, const void* base, void* out,
            DType out_dtype, int64_t numel, int num_threads);

/// memcpy for what nobody reads from this processor's cache soon: large copies go past it. bytes: 2 a byte.
void copy(const void* src, void* dst, int64_t bytes, int num_threads);

/// codes[i], scales[i / kQuantBlock]: values as 8-bit codes, rounded to nearest. A signed code is an int8, an unsigned
/// one a uint8. bytes: 5 and 4 / kQuantBlock.
void quantize(const float* values, uint8_t* codes, float* scales, int64_t numel, bool is_signed, int num_threads);

/// The inverse. bytes: as quantize.
void dequantize(const uint8_t* codes, const float* scales, float* values, int64_t numel, bool is_signed,
                int num_threads);

/// encoded[s] = slice s of values, plus residual, as codes of 8 or 4 bits, rounded stochastically, see
/// common/wire_code.h; residual becomes what that has left out: values + residual - what comes out. Blocks in which
/// something is not finite come out as NaN, and keep their residual. values: [num_slices * slice_numel], float32,
/// bfloat16 or float16. residual: bfloat16, as many, or null for none. encoded: [num_slices][wire_bytes(slice_numel,
/// bits)], 16-byte aligned; overlaps nothing else. seed, step, key: whose random numbers; the same ones give the same
/// codes. bytes: sizeof(value) + (residual ? 4 : 0) + bits / 8 + 4 / kQuantBlock.
void encode_slices(const void* values, DType dtype, uint16_t* residual, uint8_t* encoded, int64_t slice_numel,
                   int64_t num_slices, int bits, uint64_t seed, uint32_t step, uint32_t key, int num_threads);

/// out[i] = cast(base[i] + (v[0][i] + v[1][i] + ...)), the values of encoded slices summed in float32 as the tree of
/// reduce, with the bits that reduce gives for them.
/// slices: num_slices times [wire_bytes(numel, bits)], 16-byte aligned. base: null, or dtype and size of out; may be
/// out. out: [numel], float32, bfloat16 or float16.
/// bytes: num_slices * (bits / 8 + 4 / kQuantBlock) + sizeof(out) * (base ? 2 : 1).
void sum_encoded(const uint8_t* const* slices, int64_t num_slices, int bits, const void* base, void* out,
                 DType out_dtype, int64_t numel, int num_threads);

/// squares[i][0] = sum of the squares of the gradients of segment i, in float64, in an order that depends on the
/// segment alone; 0 for inactive ones. *found_inf = 1 where one of them is not finite, else it stays. grad: as in
/// Storage. bytes: sizeof(grad).
void squared_norms(const SegmentTable& segments, DType grad, float* found_inf, int num_threads);

/// sums[k] = sum of the k-th parts of all terms, exact, and so the same in any order, where the parts are small
/// multiples of one power of two. A term is |values[i] * scale|, squared if asked for; a part is what is left of it, to
/// which rounders[k] is added, by which it is rounded, and subtracted again; all in float64. rounders, sums:
/// [kSumParts]. bytes: 4.
void sum_in_parts(const float* values, int64_t numel, double scale, bool squared, const double* rounders, double* sums,
                  int num_threads);

/// One step of an optimizer, or the pass of it that is called `kernel`: csrc/ops has their formulas, names, arrays of
/// state, and the hyper-parameters that `groups`, float64[num_groups][columns], holds. Each parameter's arithmetic is
/// float32. bytes of an element: those of its arrays, read and written once each:
///
///   param    float32 8, master 4 + 4 and 2, remainder 4 + 4, stochastic 4        grad   4 or 2
///   a state  float32 8, bfloat16 4, int8 2 and 8 / kQuantBlock
///
/// so that AdamW in float32 moves 28. Squares are summed, gradients left aside, and parameters or states only read by
/// the passes that say so; see StepOp in ops/op.h.
/// @throws std::invalid_argument when there is no such kernel.
void step(const std::string& kernel, const SegmentTable& segments, const Storage& storage, const double* groups,
          const StepControl& control, int num_threads);

} // namespace cpu

/// The same kernels on a CUDA device. Every pointer, those of the tables too unless said otherwise, is device memory;
/// `stream` is a cudaStream_t. They launch and return: no allocation, no synchronisation. A failed launch throws
/// std::runtime_error.
namespace cuda {

/// Launches a kernel that does nothing, and throws where none can be launched: the driver is older than the runtime
/// that this was linked with, say, or does not know the device.
void try_launch(void* stream);

/// The newest CUDA that the driver serves, as 1000 * major + 10 * minor; 0 where there is no driver.
int driver_version();

void pack(const void* src, DType src_dtype, void* dst, DType dst_dtype, int64_t numel, double scale, void* stream);

/// The table lies in host memory, and is not looked at any more once this returns. A graph that captures it packs these
/// arrays.
void pack_segments(const SegmentTable& segments, DType src_dtype, DType dst_dtype, double scale, void* stream);

constexpr int kMaxReduceSlices = 256; // on CUDA: more are summed in groups of so many, and then their sums

/// slices: num_slices device pointers, at most kMaxReduceSlices, in host memory, which is not looked at any more once
/// this returns.
void reduce(const void* const* slices, int64_t num_slices, DType slice_dtype, const void* base, void* out,
            DType out_dtype, int64_t numel, void* stream);

void quantize(const float* values, uint8_t* codes, float* scales, int64_t numel, bool is_signed, void* stream);
void dequantize(const uint8_t* codes, const float* scales, float* values, int64_t numel, bool is_signed, void* stream);

void encode_slices(const void* values, DType dtype, uint16_t* residual, uint8_t* encoded, int64_t slice_numel,
                   int64_t num_slices, int bits, uint64_t seed, uint32_t step, uint32_t key, void* stream);

/// slices: as for reduce.
void sum_encoded(const uint8_t* const* slices, int64_t num_slices, int bits, const void* base, void* out,
                 DType out_dtype, int64_t numel, void* stream);

/// Device memory that squared_norms and the step of that name need over these segments, 16-byte aligned. total_numel:
/// sum of the sizes of the segments. Some 70 bytes a segment; norms 8 bytes for 2048 elements besides, and steps that
/// sum squares 16 for 256.
int64_t norm_workspace_bytes(int64_t num_segments, int64_t total_numel);
int64_t step_workspace_bytes(const std::string& kernel, int64_t num_segments, int64_t total_numel);

void squared_norms(const SegmentTable& segments, DType grad, float* found_inf, int64_t total_numel, void* workspace,
                   void* stream);
void step(const std::string& kernel, const SegmentTable& segments, const Storage& storage, const double* groups,
          const StepControl& control, int64_t total_numel, void* workspace, void* stream);

} // namespace cuda
} // namespace zeroopt
