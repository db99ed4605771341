#include "parallel.h"

#include <omp.h>
#include <unistd.h>

#include <atomic>
#include <exception>

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

void parallel_for(std::int64_t items, void (*body)(void*, std::int64_t), void* context) {
  const std::int64_t threads = items < max_threads() ? items : max_threads();
  if (threads <= 1) {
    for (std::int64_t item = 0; item < items; ++item) body(context, item);
    return;
  }
  // an exception (out of memory) may not leave an OpenMP region: the first one is carried out by hand
  std::exception_ptr error;
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast<int>(threads))
  for (std::int64_t item = 0; item < items; ++item) {
    try {
      body(context, item);
    } catch (...) {
      if (!failed.test_and_set()) error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace pvt
