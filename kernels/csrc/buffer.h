// Memory for what a kernel puts down between two steps.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace remora {

// Memory that grows and is used again: a call allocates nothing once it has seen its sizes.
class Buffer {
 public:
  // At least `size` bytes, 64-aligned; what was there is lost. Null where there is no memory.
  char* take(int64_t size) {
    if (size > size_) {
      std::free(data_);
      size_ = (size + size / 4 + 4095) / 4096 * 4096;
      data_ = static_cast<char*>(std::aligned_alloc(4096, size_));
      if (data_ == nullptr) size_ = 0;
    }
    return data_;
  }

  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

 private:
  char* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace remora
