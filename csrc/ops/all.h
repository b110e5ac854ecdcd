// Every optimizer, by the file and the name of its formula. What there is of each, leaf functions, launches and what
// Python is told, is made from this list.
#pragma once

#include "ops/adagrad.h"
#include "ops/adamw.h"
#include "ops/lamb.h"
#include "ops/lion.h"
#include "ops/rmsprop.h"
#include "ops/sgd.h"

namespace zeroopt {

template <class... Ops> struct OpList {};

using AllOps = OpList<AdamW, Sgd, Adagrad, Lion, RmsProp, LambMoments, LambUpdate>;

} // namespace zeroopt
