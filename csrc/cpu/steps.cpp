#include "cpu/step.h"

namespace zeroopt::cpu {

void adamw(const SegmentTable& segments, const Storage& storage, const AdamWGroup* groups, const StepControl& control,
           int num_threads) {
  step<AdamW>(segments, storage, groups, control, isa().leaves->steps->adamw, num_threads);
}

void sgd(const SegmentTable& segments, const Storage& storage, const SgdGroup* groups, const StepControl& control,
         int num_threads) {
  step<Sgd>(segments, storage, groups, control, isa().leaves->steps->sgd, num_threads);
}

void adagrad(const SegmentTable& segments, const Storage& storage, const AdagradGroup* groups,
             const StepControl& control, int num_threads) {
  step<Adagrad>(segments, storage, groups, control, isa().leaves->steps->adagrad, num_threads);
}

void lion(const SegmentTable& segments, const Storage& storage, const LionGroup* groups, const StepControl& control,
          int num_threads) {
  step<Lion>(segments, storage, groups, control, isa().leaves->steps->lion, num_threads);
}

void lamb_moments(const SegmentTable& segments, const Storage& storage, const LambGroup* groups,
                  const StepControl& control, int num_threads) {
  step<LambMoments>(segments, storage, groups, control, isa().leaves->steps->lamb_moments, num_threads);
}

void lamb_update(const SegmentTable& segments, const Storage& storage, const LambGroup* groups,
                 const StepControl& control, int num_threads) {
  step<LambUpdate>(segments, storage, groups, control, isa().leaves->steps->lamb_update, num_threads);
}

} // namespace zeroopt::cpu
