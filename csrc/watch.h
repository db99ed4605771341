// Whether memory still holds the values that it held: sums of its chunks, compared a part at a time.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace pvt {

// The caller keeps the regions readable. Calls may come from several threads; values that change meanwhile are seen now
// or at a later call.
class Watch {
 public:
  struct Region {
    const unsigned char* data;
    std::size_t bytes;
  };

  // One part of kParts of every region is compared at a time, so that a change all over a region is seen at once, and
  // any change within kParts calls.
  static constexpr std::size_t kParts = 64;

  explicit Watch(std::vector<Region> regions);

  // Is the next part as it was?
  bool next() const;

  // The first region with a change, all of them compared; -1 where there is none.
  std::ptrdiff_t first_changed() const;

 private:
  static constexpr std::size_t kChunk = 4096;

  static std::size_t chunks(const Region& region) { return (region.bytes + kChunk - 1) / kChunk; }
  bool same(const Region& region, std::size_t first_sum, std::size_t chunk) const;

  std::vector<Region> regions_;
  std::vector<std::uint64_t> sums_;  // of every chunk of every region
  mutable std::atomic<std::size_t> calls_{0};
};

}  // namespace pvt
