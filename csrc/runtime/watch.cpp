#include "runtime/watch.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "runtime/parallel.h"

namespace pvt {
namespace {

constexpr std::size_t kBlock = 1024;                      // bytes that take other keys each
constexpr std::size_t kMinPart = 256;                     // bytes: enough of them for a change all over to be in it
constexpr std::size_t kMinShared = std::size_t{1} << 18;  // bytes of a region that are worth other threads

using Keys = std::array<std::uint32_t, kBlock / 4 + 2>;

const Keys& keys() {
  static const Keys made = [] {
    Keys all{};
    std::uint64_t state = 0x9e3779b97f4a7c15;
    for (std::uint32_t& key :
         all) {  // splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators")
      std::uint64_t z = state += 0x9e3779b97f4a7c15;
      z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
      z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
      key = std::uint32_t((z ^ (z >> 31)) >> 32);
    }
    return all;
  }();
  return made;
}

std::uint32_t word(const unsigned char* at) {
  std::uint32_t value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

// The NH function of UMAC (Black et al., "UMAC: fast and secure message authentication", 1999): two inputs of one
// length that differ have the same sum with probability 2^-32 over the keys. No multiplication waits for another, so
// that it takes memory's speed on any instruction set.
std::uint64_t block_sum(const unsigned char* data, std::size_t bytes) {
  const Keys& key = keys();
  const std::size_t half = bytes / 8;  // pairs of words
  const unsigned char* second = data + 4 * half;
  std::uint64_t total = 0;
  for (std::size_t i = 0; i < half; ++i)
    total += std::uint64_t{word(data + 4 * i) + key[i]} * std::uint32_t(word(second + 4 * i) + key[half + i]);
  if (bytes % 8 == 0) return total;
  unsigned char rest[8] = {};
  std::memcpy(rest, data + 8 * half, bytes % 8);
  return total + std::uint64_t{word(rest) + key[2 * half]} * std::uint32_t(word(rest + 4) + key[2 * half + 1]);
}

std::uint64_t sum(const unsigned char* data, std::size_t bytes) {
  std::uint64_t total = 0;
  for (std::size_t at = 0; at < bytes; at += kBlock)
    total = total * 0x9e3779b97f4a7c15 + block_sum(data + at, std::min(kBlock, bytes - at));
  return total;
}

}  // namespace

Watch::Watch(const std::vector<Region>& regions) {
  std::ptrdiff_t index = 0;
  for (const Region& region : regions) {
    Watched watched{region, index++, std::max(kMinPart, (region.bytes + kParts - 1) / kParts), {}};
    watched.sums.resize((region.bytes + watched.part - 1) / watched.part);
    if (!watched.sums.empty()) all_.push_back(std::move(watched));
  }
  for (Watched& watched : all_)
    parallel_for_if(watched.region.bytes >= kMinShared, std::int64_t(watched.sums.size()),
                    [&](std::int64_t part) { watched.sums[part] = part_sum(watched, part); });
}

std::uint64_t Watch::part_sum(const Watched& watched, std::size_t part) {
  const std::size_t at = part * watched.part;
  return sum(watched.region.data + at, std::min(watched.part, watched.region.bytes - at));
}

bool Watch::same(const Watched& watched, std::size_t part) { return part_sum(watched, part) == watched.sums[part]; }

bool Watch::next() const {
  const std::size_t call = calls_.fetch_add(1, std::memory_order_relaxed);
  // a forward leaves nothing of them in the inner caches: all are asked for before the first is looked at
  for (const Watched& watched : all_)
    for (int line = 0; line < 4; ++line)
      __builtin_prefetch(watched.region.data + call % watched.sums.size() * watched.part + 64 * line);
  for (const Watched& watched : all_)
    if (!same(watched, call % watched.sums.size())) return false;
  return true;
}

std::ptrdiff_t Watch::first_changed() const {
  for (const Watched& watched : all_)
    for (std::size_t part = 0; part < watched.sums.size(); ++part)
      if (!same(watched, part)) return watched.index;
  return -1;
}

}  // namespace pvt
