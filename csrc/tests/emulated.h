// AMX's tiles, and the few AVX-512 instructions that isa/ asks for by name, in plain C++, so that these kernels run on
// every CPU with AVX2 (`make avx512-test`). Forced into the compilation of isa/amx.cpp and isa/avx512*.cpp before
// anything else, whose target regions the Makefile narrows to AVX2: the compiler does vectors of 512 bits in halves.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace emulated {

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

// Inlined, as functions of another target take wide vectors in other registers.
#define PVT_EMULATED_INLINE __attribute__((always_inline)) inline

using Floats = float __attribute__((vector_size(64)));
using Bits = std::uint32_t __attribute__((vector_size(64)));
using Halves = std::uint16_t __attribute__((vector_size(32)));
using Pairs = std::uint16_t __attribute__((vector_size(64)));

// The second operand where either is NaN, as the instructions.
template <class V>
PVT_EMULATED_INLINE Floats min(V a, V b) {
  const Bits below = reinterpret_cast<Bits>(a < b);
  return reinterpret_cast<Floats>((reinterpret_cast<Bits>(a) & below) | (reinterpret_cast<Bits>(b) & ~below));
}
template <class V>
PVT_EMULATED_INLINE Floats max(V a, V b) {
  const Bits above = reinterpret_cast<Bits>(a > b);
  return reinterpret_cast<Floats>((reinterpret_cast<Bits>(a) & above) | (reinterpret_cast<Bits>(b) & ~above));
}
PVT_EMULATED_INLINE __m512i widen(__m256i halves) {
  return reinterpret_cast<__m512i>(__builtin_convertvector(reinterpret_cast<Halves>(halves), Bits));
}
// To nearest, ties to even; NaN stays NaN, denormals become zero.
template <class V>
PVT_EMULATED_INLINE __m256i round_to_bf16(V values) {
  Halves rounded;
  for (int i = 0; i < 16; ++i) {
    const float value = values[i];
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7f800000) == 0) bits &= 0x80000000;
    rounded[i] = std::uint16_t(value != value ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
  return reinterpret_cast<__m256i>(rounded);
}
PVT_EMULATED_INLINE __m512i load(const void* from) {
  __m512i values;
  std::memcpy(&values, from, sizeof values);
  return values;
}
PVT_EMULATED_INLINE __m512i splat(int value) { return reinterpret_cast<__m512i>(Bits{} + std::uint32_t(value)); }
// The upper product of each pair is added first.
template <class V>
PVT_EMULATED_INLINE Floats add_products(V sums, Pairs a, Pairs b) {
  for (int i = 0; i < 16; ++i)
    for (int j = 1; j >= 0; --j) sums[i] += widened(a[2 * i + j]) * widened(b[2 * i + j]);
  return sums;
}

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::load_config
#define _tile_release emulated::release
#define _tile_zero emulated::zero
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_dpbf16ps emulated::multiply_bf16
#define _mm512_min_ps emulated::min
#define _mm512_max_ps emulated::max
#define _mm512_cvtepu16_epi32 emulated::widen
#define _mm512_cvtneps_pbh emulated::round_to_bf16
#define _mm512_loadu_si512 emulated::load
#define _mm512_set1_epi32 emulated::splat
#define _mm512_dpbf16_ps emulated::add_products
#define __m512bh emulated::Pairs
#define __builtin_cpu_supports(feature) 1
