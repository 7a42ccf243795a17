// The command line of the bare benchmarks: name=value, and lists of values.
#pragma once
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

// The value of the first `name=value`, or `otherwise`.
inline std::string option(int argc, char** argv, const std::string& name, const std::string& otherwise) {
  for (int i = 1; i < argc; ++i)
    if (!std::strncmp(argv[i], (name + "=").c_str(), name.size() + 1)) return argv[i] + name.size() + 1;
  return otherwise;
}

inline std::vector<std::string> split(const std::string& s, char separator = ',') {
  std::vector<std::string> parts;
  std::stringstream stream(s);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}
