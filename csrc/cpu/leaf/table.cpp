#include "cpu/leaf/table.h"

namespace zeroopt::cpu::ZEROOPT_ISA {

const LeafTable leaf_table = {&pack_table, &reduce_table, copy,         &format_table,
                              &wire_table, sum_squares,   sum_in_parts, &step_table};

} // namespace zeroopt::cpu::ZEROOPT_ISA
