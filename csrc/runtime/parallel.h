// Work items over threads. The threads are OpenMP's, which torch shares: torch.set_num_threads rules.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pvt {

// Threads that the next items are shared out to.
int max_threads();

// Bytes of one core's second-level cache, read from the machine; 1 MiB where it does not tell.
std::size_t l2_bytes();

// A thread's share of the items [0, n): a range of its own, taken in order, so that what neighbouring items share stays
// in its cache; then, one at a time, the last items of the thread that has most left, so that none waits for a slower
// core.
class Worker {
 public:
  // The next item, or -1 when none is left.
  virtual std::int64_t next() = 0;

 protected:
  ~Worker() = default;
};

// body() on the calling thread, with the others at hand: items within it are shared out by a word in memory, not by a
// parallel region of OpenMP for each, whose end waits for every thread, whether it did anything or not. A thread that
// the system does not run costs nothing but its help: the caller does what nobody else has begun, and who waits long
// sleeps.
void with_team(void (*body)(void* context), void* context);

template <class Body>
void with_team(const Body& body) {
  with_team([](void* context) { (*static_cast<const Body*>(context))(); }, const_cast<Body*>(&body));
}

void parallel_workers(std::int64_t items, void (*body)(void* context, Worker& worker), void* context);

// body(worker) on up to max_threads() threads, which together take every item once.
template <class Body>
void parallel_workers(std::int64_t items, const Body& body) {
  parallel_workers(
      items, [](void* context, Worker& worker) { (*static_cast<const Body*>(context))(worker); },
      const_cast<Body*>(&body));
}

// body(item) for every item of [0, items), in any order.
template <class Body>
void parallel_for(std::int64_t items, const Body& body) {
  parallel_workers(items, [&](Worker& worker) {
    for (std::int64_t item; (item = worker.next()) >= 0;) body(item);
  });
}

// The same, on the calling thread and in order where the items are not worth handing to others.
template <class Body>
void parallel_for_if(bool worth, std::int64_t items, const Body& body) {
  if (worth) return parallel_for(items, body);
  for (std::int64_t item = 0; item < items; ++item) body(item);
}

}  // namespace pvt
