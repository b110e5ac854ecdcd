#include <cstring>

#include "common/dtype.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/segment_work.h"

namespace zeroopt::cpu {
namespace {

constexpr int64_t kGrain = 64 * 1024; // elements a thread

char* at(void* array, DType dtype, int64_t index) {
  return static_cast<char*>(array) + index * dtype_bytes(dtype);
}

const char* at(const void* array, DType dtype, int64_t index) {
  return static_cast<const char*>(array) + index * dtype_bytes(dtype);
}

} // namespace

void pack(const void* src, DType src_dtype, void* dst, DType dst_dtype, int64_t numel, double scale, int num_threads) {
  const bool copies = src_dtype == dst_dtype && scale == 1.0;
  if (numel == 0 || (copies && src == dst)) return;
  const PackLeaf leaf = isa().leaves->pack->leaf[dtype_index(src_dtype)][dtype_index(dst_dtype)];
  const int threads = worthwhile_threads(numel, kGrain, num_threads);
  parallel(threads, [&](int index) {
    const int64_t begin = share_begin(numel, index, threads);
    const int64_t count = share_begin(numel, index + 1, threads) - begin;
    char* to = at(dst, dst_dtype, begin);
    const char* from = at(src, src_dtype, begin);
    if (copies) {
      std::memcpy(to, from, static_cast<size_t>(count * dtype_bytes(dst_dtype)));
    } else {
      leaf(from, to, count, scale);
    }
  });
}

void pack_segments(const SegmentTable& table, DType src_dtype, DType dst_dtype, double scale, int num_threads) {
  const PackLeaf leaf = isa().leaves->pack->leaf[dtype_index(src_dtype)][dtype_index(dst_dtype)];
  SegmentWork(table).run(num_threads, [&](const SegmentWork::Piece& piece, int64_t begin, int64_t end) {
    const SegmentRow& row = table.rows[piece.segment];
    leaf(at(row.grad, src_dtype, begin), at(row.param, dst_dtype, begin), end - begin, scale);
  });
}

} // namespace zeroopt::cpu
