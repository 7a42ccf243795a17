// Time, energy and clock of what the library launches while the GPU never idles, and of cuBLAS.
#pragma once
#include "cublas_reference.h"
#include "product.h"
#include "under_load.h"

// Of n rows of x, `seconds` each, twice in turns; prints a line. `config`: the name of what to launch instead of the choice, or empty.
void measure_load(const Problem& p, int n, const std::string& config, double seconds, cudaStream_t stream, CublasReference& cublas,
                  const PowerMeter& meter);
