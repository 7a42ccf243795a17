// Scratch that threads take turns with: there are never more buffers than threads at work.
#pragma once
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

namespace jaxzip {

class BufferPool {
 public:
  using Buffer = std::vector<uint16_t>;

  // A buffer of at least `size` elements, handed back when the lease ends.
  class Lease {
   public:
    Lease(BufferPool& pool, int64_t size) : pool_(pool), buffer_(pool.Take()) {
      if (buffer_.size() < static_cast<size_t>(size)) buffer_.resize(static_cast<size_t>(size));
    }
    ~Lease() { pool_.Return(std::move(buffer_)); }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    uint16_t* data() { return buffer_.data(); }

   private:
    BufferPool& pool_;
    Buffer buffer_;
  };

 private:
  Buffer Take() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) return {};
    Buffer buffer = std::move(free_.back());
    free_.pop_back();
    return buffer;
  }
  void Return(Buffer buffer) {
    std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(buffer));
  }
  std::mutex mutex_;
  std::vector<Buffer> free_;
};

}  // namespace jaxzip
