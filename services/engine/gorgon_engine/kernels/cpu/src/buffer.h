// Working memory that is kept between calls.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace gorgon {

// Memory that grows and stays, cache-line aligned.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  // At least `count` of T; what was there before is lost when it grows. Throws std::bad_alloc.
  template <typename T>
  T* get(int64_t count) {
    return static_cast<T*>(reserve(count * static_cast<int64_t>(sizeof(T))));
  }

 private:
  void* reserve(int64_t bytes) {
    if (bytes > capacity_) {
      std::free(data_);
      capacity_ = (bytes + bytes / 4 + 4096) / 64 * 64;
      data_ = std::aligned_alloc(64, capacity_);
      if (!data_) {
        capacity_ = 0;
        throw std::bad_alloc();
      }
      std::memset(data_, 0, capacity_);  // padding words are read (against zero weights) and must not be NaN
    }
    return data_;
  }

  void* data_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace gorgon
