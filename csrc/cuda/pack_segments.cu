#include "cuda/pack_segments.cuh"

#include "cuda/launch.h"

namespace zeroopt::cuda {
namespace {

constexpr const char* kName = "pack_segments";
constexpr size_t kMaxArguments = 4096; // bytes, of any device and any CUDA
static_assert(sizeof(PackBatch) + 2 * sizeof(DType) + sizeof(double) <= kMaxArguments);

void add(const SegmentRow& row, DType src, DType dst, PackBatch& batch) {
  const unsigned leads =
      leads_of(row.grad, static_cast<int>(dtype_bytes(src))) & leads_of(row.param, static_cast<int>(dtype_bytes(dst)));
  const int lead = smallest_lead(leads);
  batch.pieces[batch.count++] = {row.grad, row.param, row.numel, batch.tiles, lead};
  batch.tiles += num_tiles(row.numel, lead);
}

template <class Value>
void launch_batch(const PackBatch& batch, DType src, DType dst, double scale, cudaStream_t stream) {
  const auto kernel = pack_segments_kernel<Value>;
  const unsigned grid = grid_size(kernel, batch.tiles / kWarpsPerBlock + 1, kName);
  launch(kName, kernel, grid, stream, batch, src, dst, static_cast<Value>(scale));
}

} // namespace

void pack_segments(const SegmentTable& segments, DType src_dtype, DType dst_dtype, double scale, void* stream) {
  const bool in_float64 = src_dtype == DType::float64 || dst_dtype == DType::float64;
  const auto launch_one = in_float64 ? launch_batch<double> : launch_batch<float>;
  PackBatch batch = {};
  for (int64_t i = 0; i < segments.count; ++i) {
    if (segments.active[i] != 0) add(segments.rows[i], src_dtype, dst_dtype, batch);
    const bool full = batch.count == kPiecesPerLaunch || i + 1 == segments.count;
    if (!full || batch.count == 0) continue;
    launch_one(batch, src_dtype, dst_dtype, scale, static_cast<cudaStream_t>(stream));
    batch.count = 0;
    batch.tiles = 0;
  }
}

} // namespace zeroopt::cuda
