// A matrix as bands of 64 rows, for encoders: dense memory, or another format that is decoded a band at a time.
#pragma once
#include <functional>

#include "codec.h"

namespace jaxzip {

struct Bands {
  int64_t m, k;
  // Calls `use` with the rows from 64 * block_row on (64 of them, fewer at the end), which live until it returns.
  // Any thread, any order, any number of times. A fault of the source means that `use` was not called.
  std::function<Fault(int64_t block_row, const std::function<void(const Matrix& rows)>& use)> with;
};

Bands BandsOf(const Matrix& matrix);
Bands BandsOf(const Payload& payload);
Bands BandsOf(const LanePlanarPayload& payload);

// with() for every band; throws std::invalid_argument for the source's first fault.
void ForEachBand(const Bands& bands, const For& parallel_for,
                 const std::function<void(int64_t block_row, const Matrix& rows)>& use);

}  // namespace jaxzip
