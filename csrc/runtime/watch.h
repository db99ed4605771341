// Whether memory still holds the values that it held: sums of its parts, compared one at a time.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
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

  explicit Watch(const std::vector<Region>& regions);

  // Is the next part as it was?
  bool next() const;

  // The first region with a change, all of them compared; -1 where there is none.
  std::ptrdiff_t first_changed() const;

 private:
  struct Watched {
    Region region;
    std::ptrdiff_t index;
    std::size_t part;                 // bytes
    std::vector<std::uint64_t> sums;  // of its parts, at most kParts
  };

  static std::uint64_t part_sum(const Watched& watched, std::size_t part);
  static bool same(const Watched& watched, std::size_t part);

  std::vector<Watched> all_;
  mutable std::atomic<std::size_t> calls_{0};
};

}  // namespace pvt
