// Memory between two pages that may not be touched: an access past either end is a fault, not luck.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <new>

// Which end lies flush against its page; at the other one up to a page may be touched unseen.
enum class Flush { begin, end };

class Guarded {
 public:
  Guarded(std::size_t bytes, Flush flush) {
    const std::size_t page = std::size_t(sysconf(_SC_PAGESIZE));
    inside_ = (bytes + page - 1) / page * page;
    mapped_ = inside_ + 2 * page;
    void* memory = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    start_ = static_cast<char*>(memory);
    protect(PROT_READ | PROT_WRITE);
    data_ = start_ + page + (flush == Flush::end ? inside_ - bytes : 0);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(start_, mapped_); }

  void* data() const { return data_; }

  // From now on a write is a fault, too.
  void seal() { protect(PROT_READ); }

 private:
  void protect(int access) {
    if (inside_ != 0 && mprotect(start_ + (mapped_ - inside_) / 2, inside_, access) != 0) throw std::bad_alloc();
  }

  char *start_, *data_;
  std::size_t inside_, mapped_;
};
