#include "cpu/leaf/table.h"

namespace zeroopt::cpu::ZEROOPT_ISA {

const LeafTable leaf_table = {&pack_table, &reduce_table, copy, adamw, sgd};

} // namespace zeroopt::cpu::ZEROOPT_ISA
