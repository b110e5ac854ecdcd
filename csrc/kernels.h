// The contract of every kernel. No torch here: addresses, sizes, dtype codes, a thread count or a CUDA stream.
//
// The caller (zeroopt/ops.py) has checked dtype, device, contiguity, sizes and aliasing; a kernel only computes.
// "bytes" counts what one element moves to and from memory, the cost that matters: every kernel is bound by memory.
// Results do not depend on the thread count or the instruction set: no contraction into fused multiply-adds, and sums
// in a fixed order.
#pragma once

#include <cstdint>

namespace zeroopt {

enum class DType : int32_t { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

/// A piece of one parameter in this rank's range of a bucket; the row of a table int64[num_segments][3].
struct SegmentRow {
  int64_t offset; ///< first element, counted from the pointers that are passed with the table
  int64_t numel;  ///< elements, > 0
  int64_t group;  ///< row of the table of hyper-parameters
};

/// The segments a step covers, one call for a whole bucket.
struct SegmentTable {
  const SegmentRow* rows; ///< [count], in; segments do not overlap
  const uint8_t* active;  ///< [count], in; 0: the parameter had no gradient, nothing of it is touched
  float* steps;           ///< [count], in/out; steps taken so far; active ones are raised by one before the update
  int64_t count;
};

/// Hyper-parameters of one param_group: a row of a table float64[num_groups][8].
struct AdamWGroup {
  double lr, beta1, beta2, eps, weight_decay;
  double decoupled; ///< 1: AdamW's decay of the parameter; 0: Adam's L2 term in the gradient
  double amsgrad;   ///< 1: divide by the largest second moment so far
  double maximize;  ///< 1: ascend
};

/// Hyper-parameters of one param_group: a row of a table float64[num_groups][6].
struct SgdGroup {
  double lr, momentum, dampening, weight_decay;
  double nesterov; ///< 1 or 0
  double maximize; ///< 1 or 0
};

struct AdamWTensors {
  float* param;          ///< in/out
  const float* grad;     ///< in
  float* exp_avg;        ///< in/out
  float* exp_avg_sq;     ///< in/out
  float* max_exp_avg_sq; ///< in/out; null when no group uses amsgrad
};

struct SgdTensors {
  float* param;           ///< in/out
  const float* grad;      ///< in
  float* momentum_buffer; ///< in/out; null when no group has momentum. The first step of a segment overwrites it.
};

namespace cpu {

/// dst[i] = cast(src[i] * scale). float32 arithmetic (float64 when either side is). dst may be src itself (same dtype).
/// Packing a gradient into its bucket, and unpacking, with the roles exchanged. bytes: sizeof(src) + sizeof(dst).
void pack(const void* src, DType src_dtype, void* dst, DType dst_dtype, int64_t numel, double scale, int num_threads);

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

/// One AdamW or Adam step. The arrays do not overlap. bytes: 28 (36 with amsgrad).
void adamw(const AdamWTensors& tensors, const SegmentTable& segments, const AdamWGroup* groups, int num_threads);

/// One SGD step. The arrays do not overlap. bytes: 12 (20 with momentum).
void sgd(const SgdTensors& tensors, const SegmentTable& segments, const SgdGroup* groups, int num_threads);

} // namespace cpu

/// The same kernels on a CUDA device. Every pointer, those of the tables too, is device memory; `stream` is a
/// cudaStream_t. They launch and return: no allocation, no synchronisation. A failed launch throws std::runtime_error.
namespace cuda {

void pack(const void* src, DType src_dtype, void* dst, DType dst_dtype, int64_t numel, double scale, void* stream);

/// slices: device array of num_slices device pointers.
void reduce(const void* const* slices, int64_t num_slices, DType slice_dtype, const void* base, void* out,
            DType out_dtype, int64_t numel, void* stream);

/// workspace: device memory of adamw_workspace_bytes(segments.count) bytes, 16-byte aligned.
/// total_numel: sum of the sizes of the segments, for the size of the grid.
int64_t adamw_workspace_bytes(int64_t num_segments);
void adamw(const AdamWTensors& tensors, const SegmentTable& segments, const AdamWGroup* groups, int64_t total_numel,
           void* workspace, void* stream);

int64_t sgd_workspace_bytes(int64_t num_segments);
void sgd(const SgdTensors& tensors, const SegmentTable& segments, const SgdGroup* groups, int64_t total_numel,
         void* workspace, void* stream);

} // namespace cuda
} // namespace zeroopt
