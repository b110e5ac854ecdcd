// Arrays as tiles of kTile elements, and the pieces of many arrays, tiles or more, in a row.
//
//   arrays             |--- 0 ---|- 1 -|------ 2 ------|
//   tiles              | 0 | 1 |2| 3 |4| 5 | 6 | 7 | 8 |
//   first_tile         0           3     5               9
//
// Arrays that are walked together, such as a parameter and its gradient, are cut where all of them have a boundary of
// memory, which may be some elements, the lead, ahead of their first.
#pragma once

#include "cuda/lane.cuh"

namespace zeroopt::cuda {

constexpr int kUnaligned = -1; // a lead: there is no such place, elements are accessed one at a time

/// The numbers of elements, as bits, by which vectors may be cut ahead of an array.
ZEROOPT_INLINE unsigned leads_of(const void* array, int item_bytes) {
  const uintptr_t alignment = static_cast<uintptr_t>(vector_alignment(item_bytes, kLaneNumel));
  unsigned leads = 0;
  for (int lead = 0; lead < kLaneNumel; ++lead)
    if ((reinterpret_cast<uintptr_t>(array) - static_cast<uintptr_t>(lead * item_bytes)) % alignment == 0)
      leads |= 1u << lead;
  return leads;
}

ZEROOPT_INLINE int smallest_lead(unsigned leads) {
  for (int lead = 0; lead < kLaneNumel; ++lead)
    if (leads >> lead & 1u) return lead;
  return kUnaligned;
}

ZEROOPT_INLINE int64_t num_tiles(int64_t numel, int lead) {
  return (numel + (lead == kUnaligned ? 0 : lead) + kTile - 1) / kTile;
}

/// What this lane has of a tile of an array.
/// @param tile counted from the array's first
ZEROOPT_DEVICE LaneRange lane_range(int64_t tile, int64_t numel, int lead) {
  const bool aligned = lead != kUnaligned;
  return LaneRange::of(tile * kTile - (aligned ? lead : 0), lane_index(), numel, aligned);
}

/// The array that a piece of the row is of: the last one whose first piece is not after it. Arrays without pieces are
/// passed over. Found by bisection, but for most of a large array's: those are of the same as the one before.
/// @param first_piece first_piece(i) is that of array i
/// @param low the array of an earlier piece, or 0
template <class FirstPiece>
ZEROOPT_DEVICE int64_t array_of(const FirstPiece& first_piece, int64_t low, int64_t count, int64_t piece) {
  if (low + 1 == count || piece < first_piece(low + 1)) return low;
  int64_t high = count;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (first_piece(middle) <= piece) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

} // namespace zeroopt::cuda
