// The first fault that threads find.
#pragma once
#include <mutex>

#include "jaxzip/kernels.h"

namespace jaxzip {

// Keeps the fault of the lowest unit, so that the message does not depend on timing.
class FaultSink {
 public:
  void Report(int64_t unit, const Fault& fault) {
    if (!fault.field) return;
    std::lock_guard<std::mutex> lock(mutex_);
    if (!fault_.field || unit < unit_) {
      unit_ = unit;
      fault_ = fault;
    }
  }
  Fault Get() const { return fault_; }

 private:
  std::mutex mutex_;
  int64_t unit_ = 0;
  Fault fault_;
};

}  // namespace jaxzip
