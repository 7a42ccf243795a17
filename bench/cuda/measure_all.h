// Times of all configurations of the kernels, and of the best of cuBLAS: for the tables of what is fastest.
#pragma once
#include <cstdio>
#include <vector>

#include "cublas_reference.h"
#include "kernels.h"
#include "product.h"

// Of n rows of x, plain launches in a graph; the best ones once more after a pause, since many configurations in a row heat the GPU. Prints a line and
// the best of `variants` kernels and cluster sizes; `timings`, if it is one, gets a line "m k n cublas us name" of each.
void measure_all(const Problem& p, const std::vector<Candidate>& kernels, int n, size_t variants, cudaStream_t stream, CublasReference& cublas,
                 std::FILE* timings);
