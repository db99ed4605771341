#include "watch.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace pvt {
namespace {

using Keys = std::array<std::uint32_t, 4096 / 4 + 2>;

const Keys& keys() {
  static const Keys made = [] {
    Keys all{};
    std::uint64_t state = 0x9e3779b97f4a7c15;
    for (std::uint32_t& key : all) {  // splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators")
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

// The NH function of UMAC (Black et al., "UMAC: fast and secure message authentication", 1999): two inputs of one length
// that differ have the same sum with probability 2^-32 over the keys. No multiplication waits for another, so that it
// takes memory's speed on any instruction set.
std::uint64_t sum(const unsigned char* data, std::size_t bytes) {
  const Keys& key = keys();
  const std::size_t half = bytes / 8;  // pairs of words
  const unsigned char* second = data + 4 * half;
  std::uint64_t total = 0;
  for (std::size_t i = 0; i < half; ++i)
    total += std::uint64_t{word(data + 4 * i) + key[i]} * std::uint32_t(word(second + 4 * i) + key[half + i]);
  unsigned char rest[8] = {};
  std::memcpy(rest, data + 8 * half, bytes - 8 * half);
  return total + std::uint64_t{word(rest) + key[2 * half]} * std::uint32_t(word(rest + 4) + key[2 * half + 1]);
}

}  // namespace

Watch::Watch(std::vector<Region> regions) : regions_(std::move(regions)) {
  for (const Region& region : regions_)
    for (std::size_t at = 0; at < region.bytes; at += kChunk)
      sums_.push_back(sum(region.data + at, std::min(kChunk, region.bytes - at)));
}

bool Watch::same(const Region& region, std::size_t first_sum, std::size_t chunk) const {
  const std::size_t at = chunk * kChunk;
  return sum(region.data + at, std::min(kChunk, region.bytes - at)) == sums_[first_sum + chunk];
}

bool Watch::next() const {
  const std::size_t call = calls_.fetch_add(1, std::memory_order_relaxed);
  // a forward leaves nothing of them in the inner caches: all are asked for before the first is looked at
  auto first_chunk = [&](const Region& region) {
    const std::size_t count = chunks(region);
    return count == 0 ? 0 : call * ((count + kParts - 1) / kParts) % count;
  };
  for (const Region& region : regions_)
    for (int line = 0; line < 4; ++line) __builtin_prefetch(region.data + first_chunk(region) * kChunk + 64 * line);
  std::size_t first_sum = 0;
  for (const Region& region : regions_) {
    const std::size_t count = chunks(region), part = (count + kParts - 1) / kParts, first = first_chunk(region);
    for (std::size_t i = 0; i < part; ++i)
      if (!same(region, first_sum, (first + i) % count)) return false;
    first_sum += count;
  }
  return true;
}

std::ptrdiff_t Watch::first_changed() const {
  std::size_t first_sum = 0;
  for (std::size_t r = 0; r < regions_.size(); ++r) {
    const std::size_t count = chunks(regions_[r]);
    for (std::size_t i = 0; i < count; ++i)
      if (!same(regions_[r], first_sum, i)) return std::ptrdiff_t(r);
    first_sum += count;
  }
  return -1;
}

}  // namespace pvt
