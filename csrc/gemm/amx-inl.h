// The AMX matrix unit: 16 x 16 float tiles += (16 x 32) x (32 x 16) bf16.
// Compiled once per ISA: included by isa/amx.cpp after its vectors, in place of gemm/tile-inl.h.

#include "gemm/layout-inl.h"
#include "gemm/epilogue-inl.h"

template <>
inline constexpr int kDepthStep<bf16> = 32;  // one tile: 16 rows of 2 x 16

// Eight tiles of 16 rows of 64 bytes, as the CPU reads it.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// A constant in memory: GCC 12's intrinsic tells the compiler of the first 8 bytes only, so that it may leave out the
// stores that fill the rest of a local.
inline constexpr TileConfig kTileConfig;

// Holds the unit configured for a work item; other libraries on the same thread use it between items.
struct MatrixUnit {
  MatrixUnit() { _tile_loadconfig(&kTileConfig); }
  ~MatrixUnit() { _tile_release(); }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;
};

// One or two tiles of 16 rows times a panel of two tiles, tiles 0-3 the sums, 4-5 rows of a, 6-7 the panel: each loaded
// tile is used twice. The sums start from `bias` (of the panel's columns), or null for 0, and go to two tiles of `to`,
// `ld` floats between rows. Where a second hardware thread is busy the unit has few spare registers and a product waits
// for the load before it; hence the loads of the next step stand as early as their tile is free.
//
// The panel is fetched kAhead steps before its use: a tile load is 16 lines at once, more than the hardware's own
// prefetching keeps up with.
template <bool kTwo>
void multiply_amx(const bf16* a, std::ptrdiff_t lda, std::ptrdiff_t a_step, const bf16* b, int depth, const float* bias,
                  float* to, std::ptrdiff_t ld) {
  constexpr int kPairRow = kPanel * 2 * sizeof(bf16);  // bytes of one k pair in the panel
  const std::ptrdiff_t row_bytes = lda * sizeof(bf16);
  if (bias) {
    _tile_loadd(0, bias, 0);
    _tile_loadd(1, bias + 16, 0);
    if constexpr (kTwo) {
      _tile_loadd(2, bias, 0);
      _tile_loadd(3, bias + 16, 0);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTwo) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  _tile_loadd(6, b, kPairRow);
  _tile_loadd(4, a, row_bytes);
  _tile_loadd(7, b + kPanel, kPairRow);
  if constexpr (kTwo) _tile_loadd(5, a + 16 * lda, row_bytes);
  constexpr int kStep = 32 * kPanel, kAhead = 4, kLine = 32;  // elements
  for (int k = 32; k < depth; k += 32) {
#pragma GCC unroll 32
    for (int i = 0; i < kStep; i += kLine) __builtin_prefetch(b + kAhead * kStep + i);
    a += a_step;
    b += kStep;
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTwo) _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(6, b, kPairRow);
    if constexpr (kTwo) {
      _tile_dpbf16ps(3, 5, 7);
      _tile_loadd(5, a + 16 * lda, row_bytes);
    }
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(4, a, row_bytes);
    _tile_loadd(7, b + kPanel, kPairRow);
  }
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  const std::ptrdiff_t to_bytes = ld * sizeof(float);
  if constexpr (kTwo) {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, to, to_bytes);
  _tile_stored(1, to + 16, to_bytes);
  if constexpr (kTwo) {
    _tile_stored(2, to + 16 * ld, to_bytes);
    _tile_stored(3, to + 16 * ld + 16, to_bytes);
  }
}

// One panel's columns of the product, for all rows. Call within a MatrixUnit's life.
template <class Out>
void gemm_panel(const Rows<bf16>& a, int rows, const Panel<bf16>& panel, int column, const Epilogue<Out>& epilogue) {
  alignas(64) float result[32 * kPanel];
  // Where storing is all there is to do, whole tiles go where they belong, bias and all. The bias is then the first
  // term of all sums, those of a last part of a tile too: no bit depends on where tiles begin.
  const bool plain = std::is_same_v<Out, float> && epilogue.plain(column + kPanel);
  const float* bias = epilogue.bias + column;
  const Vec last[] = {plain ? Vec{} : load(bias), plain ? Vec{} : load(bias + kLanes)};
  const std::ptrdiff_t step = a.block_stride ? a.block_stride : 32;  // blocks are one step wide: kPanel
  for (int row = 0; row < rows; row += 32) {
    const int height = std::min(rows - row, 32);
    const bool whole = plain && height % 16 == 0;
    float* to = result;
    std::ptrdiff_t ld = kPanel;
    if constexpr (std::is_same_v<Out, float>)
      if (whole) to = epilogue.out + row * epilogue.ld + column, ld = epilogue.ld;
    const auto multiply = height > 16 ? &multiply_amx<true> : &multiply_amx<false>;
    multiply(a.data + row * a.ld, a.ld, step, panel.data, panel.depth, plain ? bias : nullptr, to, ld);
    for (int r = 0; !whole && r < height; ++r) {
      const Vec sums[1][2] = {{load(result + r * kPanel) + last[0], load(result + r * kPanel + kLanes) + last[1]}};
      epilogue.finish(row + r, column, sums);
    }
  }
}
