// Aligned buffers, and the scratch memory of a thread.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace pvt {

constexpr std::size_t kAlignment = 64;  // a cache line, and the widest vector

constexpr std::size_t round_up(std::size_t n, std::size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Owned, zero-filled, aligned array.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t size) : data_(allocate(size)), size_(size) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept : data_(other.data_), size_(other.size_) { other.data_ = nullptr; }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Buffer() { std::free(data_); }

  T* data() { return data_; }
  const T* data() const { return data_; }
  std::size_t size() const { return size_; }
  T& operator[](std::size_t i) { return data_[i]; }
  const T& operator[](std::size_t i) const { return data_[i]; }

 private:
  static T* allocate(std::size_t size) {
    const std::size_t bytes = round_up(size * sizeof(T) + 1, kAlignment);
    void* memory = std::aligned_alloc(kAlignment, bytes);
    if (memory == nullptr) throw std::bad_alloc();
    std::memset(memory, 0, bytes);
    return static_cast<T*>(memory);
  }

  T* data_ = nullptr;
  std::size_t size_ = 0;
};

// Scratch memory handed out in order and given back all at once. It grows to the largest need seen and stays, up to
// kKept: an op's need is bounded by its tile sizes, but for maps of huge images.
class Scratch {
 public:
  static constexpr std::size_t kKept = std::size_t{64} << 20;

  // Gives back what a huge image needed.
  void trim() {
    if (buffer_.size() > kKept) buffer_ = Buffer<char>();
  }
  // Makes room for `bytes` and forgets what was handed out before.
  void reset(std::size_t bytes) {
    if (bytes > buffer_.size()) buffer_ = Buffer<char>(bytes);
    used_ = 0;
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(buffer_.data(), buffer_.size());
#endif
  }
  // `count` uninitialised elements, aligned; within what `reset` made room for.
  template <class T>
  T* take(std::size_t count) {
    T* result = reinterpret_cast<T*>(buffer_.data() + used_);
    used_ += bytes_for<T>(count);
    assert(used_ <= buffer_.size());
#ifdef __SANITIZE_ADDRESS__  // what lies between the arrays is nobody's
    ASAN_POISON_MEMORY_REGION(result + count, bytes_for<T>(count) - count * sizeof(T));
#endif
    return result;
  }
  // What `take<T>(count)` uses.
  template <class T>
  static constexpr std::size_t bytes_for(std::size_t count) {
    // one more line than needed, so that arrays of a power-of-two size do not fall on the same cache sets
    return round_up(count * sizeof(T), kAlignment) + kAlignment;
  }

 private:
  Buffer<char> buffer_;
  std::size_t used_ = 0;
};

// The calling thread's scratch for one work item, and for what all threads of one op share (owned by its caller).
inline Scratch& thread_scratch() {
  thread_local Scratch scratch;
  return scratch;
}
inline Scratch& shared_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

inline void trim_scratch() {
  thread_scratch().trim();
  shared_scratch().trim();
}

}  // namespace pvt
