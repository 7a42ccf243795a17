// A configuration that the command line names.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <string>

#include "matmul_config.h"
#include "product.h"

class GivenConfig {
 public:
  // Of an empty name there is none; ends the program where there is no such configuration for n rows of x, or it does not fit.
  GivenConfig(const Problem& p, int n, const std::string& name) {
    using namespace jaxzip::lane_planar;
    if (name.empty()) return;
    config_ = parse_config(name, n);
    if (config_ && fits(p.encoded.matrix, n, *config_)) return;
    std::fprintf(stderr, "no configuration for %d rows: %s\n", n, name.c_str());
    std::exit(2);
  }
  const jaxzip::lane_planar::MatmulConfig* get() const { return config_ ? &*config_ : nullptr; }

 private:
  std::optional<jaxzip::lane_planar::MatmulConfig> config_;
};
