// Chooses the instruction-set level at run time.
#pragma once
#include <string>
#include <vector>

#include "jaxzip/kernels.h"

namespace jaxzip {

// The best level that this machine has, unless SetIsa or the environment variable JAXZIP_CPU_ISA says another.
const KernelTable& Kernels();

// Names of the levels that this machine can run, slowest first.
std::vector<std::string> IsaLevels();

// Forces a level for the whole process; an empty name goes back to the best. Throws std::invalid_argument.
void SetIsa(const std::string& name);

}  // namespace jaxzip
