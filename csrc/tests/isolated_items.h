// A stand-in for runtime/parallel.cpp that proves what every parallel region promises: that each work item writes bytes
// of its own only, and reads none that another item of the region writes. Items run one at a time, on workers that are
// threads of their own, in whatever order; after each, what it wrote is taken out of the watched memory, so that the
// next finds all as it was before the region.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace isolated {

enum class Order { ascending, descending, shuffled, alternating };

// ascending and descending: all items on one worker; alternating: in order, each on another worker than the one before;
// shuffled: any order, any worker.
struct Schedule {
  Order order = Order::ascending;
  int threads = 1;
  std::size_t l2_bytes = std::size_t{1} << 20;
};

struct Region {
  unsigned char* data;
  std::size_t bytes;
};

// For all regions entered from now on.
void follow(const Schedule& schedule, const std::vector<Region>& watched);

// What was found since the last call, a sentence each.
std::vector<std::string> take_faults();

// Items that ran since the last call.
std::size_t take_count();

}  // namespace isolated
