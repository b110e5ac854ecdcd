// pack_segments: cast and scale of many arrays in one launch. bytes: sizeof(src) + sizeof(dst).
//
// The dtypes are the same for a whole launch, so they are branched on rather than compiled apart.
#pragma once

#include "common/dtype.h"
#include "cuda/segment_work.cuh"

namespace zeroopt::cuda {

struct PackPlan {
  int lead;
};

template <class T, class Value>
ZEROOPT_DEVICE void load_as(const void* array, const LaneRange& lane, Value (&values)[kLaneNumel]) {
  T items[kLaneNumel];
  load_lane(static_cast<const T*>(array), lane, items);
#pragma unroll
  for (int k = 0; k < kLaneNumel; ++k)
    values[k] = load(items[k]);
}

template <class T, class Value>
ZEROOPT_DEVICE void store_as(const Value (&values)[kLaneNumel], const LaneRange& lane, void* array) {
  T items[kLaneNumel];
#pragma unroll
  for (int k = 0; k < kLaneNumel; ++k)
    store(items[k], static_cast<typename Compute<T, T>::type>(values[k]));
  store_lane(static_cast<T*>(array), lane, items);
}

/// Calls body with an element of the dtype; float64 only where values are.
template <class Value, class Body> ZEROOPT_DEVICE void with_dtype(DType dtype, const Body& body) {
  switch (dtype) {
  case DType::float32:
    return body(float());
  case DType::float64:
    if constexpr (sizeof(Value) == sizeof(double)) body(double());
    return;
  case DType::bfloat16:
    return body(BFloat16());
  case DType::float16:
    return body(Float16());
  }
}

static __global__ void __launch_bounds__(kThreads)
    prepare_pack_kernel(SegmentTable table, DType src, DType dst, Workspace<PackPlan> workspace) {
  plan_segments(table, workspace, false, [&](int64_t i) {
    const unsigned leads = leads_of(table.rows[i].grad, static_cast<int>(dtype_bytes(src))) &
                           leads_of(table.rows[i].param, static_cast<int>(dtype_bytes(dst)));
    return PackPlan{smallest_lead(leads)};
  });
}

/// Value: what is multiplied in, float or double.
template <class Value>
__global__ void __launch_bounds__(kThreads)
    pack_segments_kernel(SegmentTable table, DType src, DType dst, Value scale, Workspace<PackPlan> workspace) {
  for_each_tile(table, workspace, [&](int64_t segment, int64_t, const LaneRange& lane) {
    const SegmentRow& row = table.rows[segment];
    Value values[kLaneNumel];
    with_dtype<Value>(src, [&](auto item) { load_as<decltype(item)>(row.grad, lane, values); });
#pragma unroll
    for (int k = 0; k < kLaneNumel; ++k)
      values[k] *= scale;
    with_dtype<Value>(dst, [&](auto item) { store_as<decltype(item)>(values, lane, row.param); });
  });
}

} // namespace zeroopt::cuda
