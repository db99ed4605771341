// Work items over threads. The number of threads is OpenMP's, which torch shares: torch.set_num_threads rules.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pvt {

int max_threads();

// Bytes of one core's second-level cache, read from the machine; 1 MiB where it does not tell.
std::size_t l2_bytes();

void parallel_for(std::int64_t items, void (*body)(void* context, std::int64_t item), void* context);

// body(item) for every item of [0, items), in any order, on up to max_threads() threads.
template <class Body>
void parallel_for(std::int64_t items, const Body& body) {
  parallel_for(
      items, [](void* context, std::int64_t item) { (*static_cast<const Body*>(context))(item); },
      const_cast<Body*>(&body));
}

}  // namespace pvt
