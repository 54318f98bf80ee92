// Compiled once per instruction set: BGPO_TABLE names the table and the compiler's -march decides the rest. Everything
// but the table is in an unnamed namespace, so the copies cannot be mixed up by the linker.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "engine.h"
#include "masks.inl"
#include "rows.inl"

namespace bgpo::cpu {

#define BGPO_NAME_(table) #table
#define BGPO_NAME(table) BGPO_NAME_(table)

extern const Kernels BGPO_TABLE{BGPO_NAME(BGPO_TABLE), row_statistics, dlogits, input_facts, draw_counts, draw_masks};

}  // namespace bgpo::cpu
