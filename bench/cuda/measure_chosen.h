// Times of what the library launches, and of the best of cuBLAS.
#pragma once
#include <ostream>

#include "cublas_reference.h"
#include "product.h"

// Of n rows of x: after a pause, in turns, plain and overlapped; with `steady` also after 400 ms of the same. Prints a line and writes one of
// JSON with a comma behind. `config`: the name of what to launch instead of the choice, or empty.
void measure_chosen(const Problem& p, int n, const std::string& config, bool steady, cudaStream_t stream, CublasReference& cublas, std::ostream& json);

// Decompression to [m, k] and [k, m] and a copy that reads and writes as many bytes; the same.
void measure_decompression(const Problem& p, cudaStream_t stream, std::ostream& json);
