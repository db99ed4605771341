#include "parallel.h"

#include <omp.h>
#include <unistd.h>

#include <atomic>
#include <exception>
#include <vector>

namespace pvt {

int max_threads() { return omp_in_parallel() ? 1 : omp_get_max_threads(); }

std::size_t l2_bytes() {
  static const std::size_t bytes = [] {
#ifdef _SC_LEVEL2_CACHE_SIZE
    const long size = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (size > 0) return static_cast<std::size_t>(size);
#endif
    return std::size_t{1} << 20;
  }();
  return bytes;
}

namespace {

// [begin, end) in one word, so that owner and thieves agree on every item; on a cache line of its own.
class alignas(64) Range {
 public:
  void set(std::uint32_t begin, std::uint32_t end) { word_.store(join(begin, end), std::memory_order_relaxed); }
  std::uint32_t left() const { return size(word_.load(std::memory_order_relaxed)); }
  std::int64_t take_first() {
    return take([](std::uint64_t word) { return word + 1; }, [](std::uint64_t word) { return word & kBegin; });
  }
  std::int64_t take_last() {
    return take([](std::uint64_t word) { return word - (kBegin + 1); },
                [](std::uint64_t word) { return (word >> 32) - 1; });
  }

 private:
  static constexpr std::uint64_t kBegin = 0xffffffff;  // the half that holds `begin`
  static std::uint64_t join(std::uint64_t begin, std::uint64_t end) { return end << 32 | begin; }
  static std::uint32_t size(std::uint64_t word) { return std::uint32_t(word >> 32) - std::uint32_t(word & kBegin); }

  template <class Without, class Item>
  std::int64_t take(const Without& without, const Item& item) {
    std::uint64_t word = word_.load(std::memory_order_relaxed);
    while (size(word) > 0)
      if (word_.compare_exchange_weak(word, without(word), std::memory_order_relaxed)) return std::int64_t(item(word));
    return -1;
  }

  std::atomic<std::uint64_t> word_{0};
};

class Thief final : public Worker {
 public:
  Thief(std::vector<Range>& ranges, std::size_t own) : ranges_(ranges), own_(own) {}

  std::int64_t next() override {
    std::int64_t item = ranges_[own_].take_first();
    while (item < 0) {
      Range* fullest = &ranges_[own_];
      for (Range& range : ranges_)
        if (range.left() > fullest->left()) fullest = &range;
      if (fullest->left() == 0) return -1;
      item = fullest->take_last();
    }
    return item;
  }

 private:
  std::vector<Range>& ranges_;
  std::size_t own_;
};

}  // namespace

void parallel_workers(std::int64_t items, void (*body)(void*, Worker&), void* context) {
  const std::int64_t threads = items < max_threads() ? items : max_threads();
  if (threads <= 0) return;
  std::vector<Range> ranges(threads);
  for (std::int64_t t = 0; t < threads; ++t)
    ranges[t].set(std::uint32_t(items * t / threads), std::uint32_t(items * (t + 1) / threads));
  if (threads == 1) {
    Thief worker(ranges, 0);
    body(context, worker);
    return;
  }
  // an exception (out of memory) may not leave an OpenMP region: the first one is carried out by hand
  std::exception_ptr error;
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    try {
      // the region may have been given fewer threads than asked for: what they leave is stolen
      Thief worker(ranges, omp_get_thread_num());
      body(context, worker);
    } catch (...) {
      if (!failed.test_and_set()) error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace pvt
