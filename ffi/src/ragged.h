// Grouped products: groups of rows of x, each times its own weight.
#pragma once
#include <vector>

#include "codec.h"

namespace jaxzip {

// Rows [first, first + rows) of x.
struct RowGroup {
  int64_t first, rows;
  Weight weight;  // all of one shape
};

// y[n, m] = sum_k x[n, k] w[m, k] for the rows of each group and its weight; other rows of y stay as they are. `packed` has
// room for PackedSize(n, k) floats. A row's bits depend on neither the groups nor the threads.
Fault RaggedMatmul(const std::vector<RowGroup>& groups, const void* x, bool x_is_f32, float* packed, void* y, bool y_is_f32,
                   const For& parallel_for);

}  // namespace jaxzip
