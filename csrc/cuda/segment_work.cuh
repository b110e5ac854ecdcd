// A step over many segments in one launch.
//
// A prepare kernel of one block raises the steps, makes each segment's scalars and cuts the segments into tiles. The
// main kernel's blocks stride over the tiles; which segment a tile is of, they find by bisection. Both only read device
// memory that the workspace holds, so a CUDA graph can capture them while steps and hyper-parameters change between
// replays.
//
//   segments           |--- 0 ---|- 1 -|------ 2 ------|
//   tiles              | 0 | 1 |2| 3 |4| 5 | 6 | 7 | 8 |
//   first_tile         0           3     5               9      [count + 1]
#pragma once

#include "cuda/vector.cuh"
#include "kernels.h"

namespace zeroopt::cuda {

constexpr int kStepVector = 4;                                    // float32 elements in 16 bytes
constexpr int kVectorsPerThread = 2;                              // of one tile
constexpr int kTile = kStepVector * kVectorsPerThread * kThreads; // elements

/// Where the parts of a workspace lie: int64 first_tile[count + 1], padded to 16 bytes, then Scalars scalars[count].
template <class Scalars> struct Workspace {
  int64_t* first_tile;
  Scalars* scalars;

  ZEROOPT_INLINE int64_t scalars_offset(int64_t count) { return ((count + 1) * 8 + 15) / 16 * 16; }
  ZEROOPT_INLINE int64_t bytes(int64_t count) {
    return scalars_offset(count) + count * static_cast<int64_t>(sizeof(Scalars));
  }
  ZEROOPT_INLINE Workspace at(void* memory, int64_t count) {
    return {static_cast<int64_t*>(memory),
            reinterpret_cast<Scalars*>(static_cast<char*>(memory) + scalars_offset(count))};
  }
};

/// Tiles begin at 16-byte boundaries of `param`, so a segment counts from the boundary before it.
ZEROOPT_INLINE int64_t num_tiles(const float* param, const SegmentRow& row) {
  return (row.numel + lead(param + row.offset) + kTile - 1) / kTile;
}

/// One block of kThreads. make_scalars(group row, step) gives the scalars of a segment.
template <class Scalars, class MakeScalars>
ZEROOPT_DEVICE void prepare_segments(const float* param, const SegmentTable& table, Workspace<Scalars> workspace,
                                     const MakeScalars& make_scalars) {
  __shared__ int64_t tiles_of_thread[kThreads];
  const int64_t share = (table.count + kThreads - 1) / kThreads;
  const int64_t begin = threadIdx.x * share;
  const int64_t end = begin + share < table.count ? begin + share : table.count;

  int64_t tiles = 0;
  for (int64_t i = begin; i < end; ++i) {
    if (table.active[i] == 0) continue;
    table.steps[i] += 1.0f;
    workspace.scalars[i] = make_scalars(table.rows[i].group, table.steps[i]);
    tiles += num_tiles(param, table.rows[i]);
  }
  tiles_of_thread[threadIdx.x] = tiles;
  __syncthreads();

  int64_t before = 0;
  for (unsigned t = 0; t < threadIdx.x; ++t)
    before += tiles_of_thread[t];
  for (int64_t i = begin; i < end; ++i) {
    workspace.first_tile[i] = before;
    if (table.active[i] != 0) before += num_tiles(param, table.rows[i]);
  }
  if (threadIdx.x == kThreads - 1) workspace.first_tile[table.count] = before;
}

/// The segment that a tile is of: the last one whose first tile is not after it. Segments without tiles are passed
/// over.
ZEROOPT_DEVICE int64_t segment_of_tile(const int64_t* first_tile, int64_t count, int64_t tile) {
  int64_t low = 0;
  int64_t high = count;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (first_tile[middle] <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

/// Calls vectors(element, scalars) for whole aligned vectors, if `aligned`, and element(element, scalars) for the
/// others.
template <class Scalars, class Vectors, class Element>
ZEROOPT_DEVICE void for_each_vector(const float* param, const SegmentTable& table, Workspace<Scalars> workspace,
                                    bool aligned, const Vectors& vectors, const Element& element) {
  const int64_t tiles = workspace.first_tile[table.count];
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t segment = segment_of_tile(workspace.first_tile, table.count, tile);
    const SegmentRow row = table.rows[segment];
    const Scalars scalars = workspace.scalars[segment];
    const int64_t tile_begin = (tile - workspace.first_tile[segment]) * kTile - lead(param + row.offset);
#pragma unroll
    for (int k = 0; k < kVectorsPerThread; ++k) {
      const int64_t first = tile_begin + (k * kThreads + static_cast<int>(threadIdx.x)) * kStepVector;
      if (aligned && first >= 0 && first + kStepVector <= row.numel) {
        vectors(row.offset + first, scalars);
      } else {
        for (int64_t i = first < 0 ? 0 : first; i < first + kStepVector && i < row.numel; ++i) {
          element(row.offset + i, scalars);
        }
      }
    }
  }
}

/// Blocks for the main kernel. The device knows which segments are active; this is the most tiles there can be.
inline int64_t max_tiles(int64_t total_numel, int64_t num_segments) {
  return total_numel / kTile + 2 * num_segments;
}

} // namespace zeroopt::cuda
