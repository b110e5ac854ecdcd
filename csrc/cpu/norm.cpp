#include <cmath>

#include "common/dtype.h"
#include "cpu/isa.h"
#include "cpu/segment_work.h"

namespace zeroopt::cpu {

void squared_norms(const SegmentTable& table, DType grad, float* found_inf, int num_threads) {
  const LeafTable& leaves = *isa().leaves;
  const SegmentWork work(table);
  ChunkSums sums(work, 1);
  const PackLeaf widen = leaves.pack->leaf[dtype_index(grad)][dtype_index(DType::float32)];
  work.run(num_threads, [&](const SegmentWork::Piece& piece, int64_t begin, int64_t end) {
    const char* const array = static_cast<const char*>(table.rows[piece.segment].grad);
    alignas(64) float wide[kChunk];
    for (int64_t i = begin; i < end; i += kChunk) {
      const int64_t numel = std::min(kChunk, end - i);
      const char* const from = array + i * dtype_bytes(grad);
      if (grad != DType::float32) widen(from, wide, numel, 1.0);
      sums.of(piece, i, 0) =
          leaves.sum_squares(grad == DType::float32 ? reinterpret_cast<const float*>(from) : wide, numel);
    }
  });
  for (int64_t i = 0; i < table.count; ++i)
    table.squares[2 * i] = 0.0;
  sums.write(table.squares, 2);
  for (int64_t i = 0; i < table.count; ++i)
    if (!std::isfinite(table.squares[2 * i])) *found_inf = 1.0f;
}

} // namespace zeroopt::cpu
