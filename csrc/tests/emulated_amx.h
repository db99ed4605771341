// The matrix unit's tiles in plain C++, so that the AMX kernels run where there is no such unit (`make amx-test`).
// Forced into the compilation of isa/amx.cpp before anything else; the rest of that file needs AVX-512 with BF16.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace emulated_amx {

struct Tile {
  unsigned char bytes[16][64];  // rows of 16 floats, or of 32 bf16
};
inline thread_local Tile tiles[8];
inline thread_local bool configured = false;  // tiles may be used only while they are

inline Tile& tile(int index) {
  if (!configured) __builtin_trap();
  return tiles[index];
}

inline float widened(std::uint16_t half) {
  const std::uint32_t bits = std::uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void load_config(const void*) { configured = true; }
inline void release() { configured = false; }
inline void zero(int to) { std::memset(&tile(to), 0, sizeof(Tile)); }
inline void load(int to, const void* from, std::ptrdiff_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(tile(to).bytes[r], static_cast<const char*>(from) + r * stride, 64);
}
inline void store(int from, void* to, std::ptrdiff_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(to) + r * stride, tile(from).bytes[r], 64);
}
// sums += a (16 x 32) times b (16 pairs of rows x 16 columns), pairs of k side by side
inline void multiply_bf16(int sums, int a, int b) {
  for (int r = 0; r < 16; ++r) {
    float row[16];
    std::uint16_t left[32];
    std::memcpy(row, tile(sums).bytes[r], 64);
    std::memcpy(left, tile(a).bytes[r], 64);
    for (int k = 0; k < 16; ++k) {
      std::uint16_t right[32];
      std::memcpy(right, tile(b).bytes[k], 64);
      for (int c = 0; c < 16; ++c)
        for (int i = 0; i < 2; ++i) row[c] += widened(left[2 * k + i]) * widened(right[2 * c + i]);
    }
    std::memcpy(tile(sums).bytes[r], row, 64);
  }
}

}  // namespace emulated_amx

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_amx::load_config
#define _tile_release emulated_amx::release
#define _tile_zero emulated_amx::zero
#define _tile_loadd emulated_amx::load
#define _tile_stored emulated_amx::store
#define _tile_dpbf16ps emulated_amx::multiply_bf16
