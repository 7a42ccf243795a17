// Correctness of every kernel on small and ragged problems.
#pragma once
#include <cuda_runtime.h>

#include <string>

#include "weights.h"

// Number of failures; prints one line a problem. Kernels whose name contains `only`.
int check_kernels(const ExponentClasses& classes, const std::string& only, cudaStream_t stream);
// The same of gated products by wgmma: every way to deal pairs.
int check_gated(const ExponentClasses& classes, cudaStream_t stream);
// And of products as two launches.
int check_tails(const ExponentClasses& classes, cudaStream_t stream);
// Compares the device encoder with a payload that jaxzip encoded (see payload.py) byte for byte, and decodes it.
int check_payload(const char* path, cudaStream_t stream);
// Matmuls on two streams at once, plain and in graphs, against the same alone.
int check_streams(const ExponentClasses& classes);
// Whether the library's choices fit into an SM; needs no GPU.
int check_choices();
