// Aligned buffers, and the scratch memory of a thread.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>
#include <tuple>
#include <utility>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace pvt {

constexpr std::size_t kAlignment = 64;  // a cache line, and the widest vector

constexpr std::size_t round_up(std::size_t n, std::size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Owned, aligned array.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  // Zero-filled.
  explicit Buffer(std::size_t size) : Buffer(uninitialised(size)) { std::memset(data_, 0, size * sizeof(T)); }
  static Buffer uninitialised(std::size_t size) {
    Buffer buffer;
    buffer.data_ = allocate(size), buffer.size_ = size;
    return buffer;
  }
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
    void* memory = std::aligned_alloc(kAlignment, round_up(size * sizeof(T) + 1, kAlignment));
    if (memory == nullptr) throw std::bad_alloc();
    return static_cast<T*>(memory);
  }

  T* data_ = nullptr;
  std::size_t size_ = 0;
};

// `count` elements of T, to be taken from a scratch.
template <class T>
struct Array {
  std::size_t count;
};
template <class T>
constexpr Array<T> array(std::size_t count) {
  return {count};
}

// Scratch memory, taken all at once: one statement says what arrays there are and how large the memory is. It grows to
// the largest need seen and stays, up to kKept: an op's need is bounded by its tile sizes, but for maps of huge images.
class Scratch {
 public:
  static constexpr std::size_t kKept = std::size_t{64} << 20;

  // Gives back what a huge image needed.
  void trim() {
    if (buffer_.size() > kKept) buffer_ = Buffer<char>();
  }

  // The arrays, aligned and uninitialised. Those of an earlier call are gone.
  template <class... T>
  std::tuple<T*...> take(Array<T>... arrays) {
    const std::size_t bytes = (room<T>(arrays.count) + ...);
    if (bytes > buffer_.size()) buffer_ = Buffer<char>(bytes);
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(buffer_.data(), buffer_.size());
#endif
    char* at = buffer_.data();
    return {place<T>(at, arrays.count)...};  // in this order
  }

 private:
  // One more line than needed, so that arrays of a power-of-two size do not fall on the same cache sets.
  template <class T>
  static constexpr std::size_t room(std::size_t count) {
    return round_up(count * sizeof(T), kAlignment) + kAlignment;
  }

  // `count` elements at `at`, which moves past them.
  template <class T>
  static T* place(char*& at, std::size_t count) {
    T* elements = reinterpret_cast<T*>(at);
    at += room<T>(count);
#ifdef __SANITIZE_ADDRESS__  // what lies between the arrays is nobody's
    ASAN_POISON_MEMORY_REGION(elements + count, room<T>(count) - count * sizeof(T));
#endif
    return elements;
  }

  Buffer<char> buffer_;
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
