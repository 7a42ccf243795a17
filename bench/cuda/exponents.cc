// Reads exponents.json, just well enough for that file.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>

#include "weights.h"

ExponentClasses read_exponents(const char* path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  const std::string s = text.str();
  const size_t first = s.find("\"first\":"), classes = s.find("\"classes\":");
  if (first == std::string::npos || classes == std::string::npos) {
    std::fprintf(stderr, "%s: no exponent classes in it\n", path);
    std::exit(1);
  }
  constexpr int kRowScales = 4;  // where the file does not say
  constexpr char kName[] = "\"row_scales\":";
  const size_t row_scales = s.find(kName);
  ExponentClasses result = {std::atoi(s.c_str() + first + 8),
                            row_scales == std::string::npos ? kRowScales : std::atoi(s.c_str() + row_scales + sizeof(kName) - 1), {}};
  const char* p = std::strchr(s.c_str() + classes, '[') + 1;
  while ((p = std::strpbrk(p, "[]")) && *p == '[') {
    result.counts.emplace_back();
    while (*p != ']') {
      char* end;
      result.counts.back().push_back(std::strtod(p + 1, &end));
      p = end;
    }
    ++p;
  }
  return result;
}
