// Matrix multiplication in registers: rows in place times packed weights, with the epilogue applied to the sums.
// Compiled once per ISA: included by isa/<isa>.cpp after its vectors. An ISA with a matrix unit includes gemm/amx-inl.h
// instead.
//
// The element type E of rows and weights is float, or what the ISA adds a `multiply_tile` for (gemm/dot-inl.h; bf16
// weights are otherwise widened when packed). Accumulation is in float, over k in order: a row's result does not depend
// on the tile or the thread that computes it.

#include "gemm/layout-inl.h"
#include "gemm/epilogue-inl.h"

// Holds what a work item needs to multiply: nothing, as registers are always there.
struct MatrixUnit {
  MatrixUnit() {}
};

// A register tile is kRows x kVectors vectors of accumulators, fed per k by kVectors loads of the panel and kRows
// broadcasts. It must fit the registers and, as cores that share their front end with a second hardware thread decode
// about three instructions a cycle, have few instructions per multiply-add. Each ISA's `Target` says how many rows the
// largest tile has, for a whole panel and for a narrow one.
constexpr int tile_rows(int vectors) { return vectors == kPanelVectors ? Target::kTileRows : Target::kNarrowTileRows; }

// What a tile fetches into cache for later, a piece per step of k: memory is slow enough that a core waits for what it
// did not ask for in time, and the hardware follows long streams only, not the short ones of a tile's rows. The first
// tiles fetch the panel ahead, by lines, the others the next tile's rows.
struct Ahead {
  const char* at;
  std::ptrdiff_t step;  // bytes
  bool of_rows;         // else of a panel

  PVT_INLINE void fetch() {
    __builtin_prefetch(at, 0, 3);
    at += step;
  }
};

template <int kRows, int kVectors>
PVT_INLINE void multiply_tile(const float* a, std::ptrdiff_t lda, const float* b, int depth, Ahead& ahead,
                              Vec (&acc)[kRows][kVectors]) {
#pragma GCC unroll 2
  for (int k = 0; k < depth; ++k, b += kVectors * kLanes) {
    Vec panel[kVectors];
    unrolled<kVectors>([&](auto i) PVT_LAMBDA { panel[i] = load(b + i * kLanes); });
    ahead.fetch();
    unrolled<kRows>([&](auto r) PVT_LAMBDA {
      const Vec value = splat(a[r * lda + k]);
      unrolled<kVectors>([&](auto i) PVT_LAMBDA { acc[r][i] += value * panel[i]; });
    });
  }
}

// Depth that is summed in registers before it is added to the rest: a sum of n terms in a row errs by about sqrt(n)
// roundings of its size, a sum of short sums by far less, and the long products here (k up to 4096) would otherwise err
// more than a BLAS does. Products of bf16 need it not: their own rounding is larger.
// Without fused multiply-adds each term rounds twice.
template <class E>
constexpr int kDepthBlock = !std::is_same_v<E, float>   ? 1 << 30
                            : Target::kFusedMultiplyAdd ? 256
                                                        : 32;

// k of [begin, end), where one of a's blocks begins.
template <int kRows, int kVectors, class E>
PVT_INLINE void multiply_block(const Rows<E>& a, int row, const E* b, int begin, int end, Ahead& ahead,
                               Vec (&acc)[kRows][kVectors]) {
  const E* from = a.at(row, begin);
  for (int k = begin; k < end; k += a.block, from += a.block_stride) {
    if (a.block_stride && ahead.of_rows) ahead.at = reinterpret_cast<const char*>(from + kRows * a.ld);
    multiply_tile<kRows, kVectors>(from, a.ld, b + std::ptrdiff_t(k) * kVectors * kLanes, std::min(a.block, end - k),
                                   ahead, acc);
  }
}

template <int kRows, int kVectors, class E, class Out>
void gemm_tile(const Rows<E>& a, const E* b, int depth, Ahead ahead, int row, int column,
               const Epilogue<Out>& epilogue) {
  Vec acc[kRows][kVectors];
  const auto multiply = [&](int begin, int end) PVT_LAMBDA {
    for_each(acc, [&](auto r, auto i) PVT_LAMBDA { acc[r][i] = Vec{}; });
    multiply_block(a, row, b, begin, end, ahead, acc);
  };
  multiply(0, std::min(depth, kDepthBlock<E>));
  if (depth > kDepthBlock<E>) {
    float total[kRows][kVectors][kLanes];
    for_each(acc, [&](auto r, auto i) PVT_LAMBDA { store(total[r][i], acc[r][i]); });
    for (int k = kDepthBlock<E>; k < depth; k += kDepthBlock<E>) {
      multiply(k, std::min(depth, k + kDepthBlock<E>));
      for_each(acc, [&](auto r, auto i) PVT_LAMBDA { store(total[r][i], load(total[r][i]) + acc[r][i]); });
    }
    for_each(acc, [&](auto r, auto i) PVT_LAMBDA { acc[r][i] = load(total[r][i]); });
  }
  // last: begun with a large bias, every addition of small terms would round at its size
  for_each(acc, [&](auto r, auto i) PVT_LAMBDA { acc[r][i] += load(epilogue.bias + column + i * kLanes); });
  epilogue.finish(row, column, acc);
}

template <int kVectors, class E, class Out, int... kRows>
constexpr auto gemm_tiles(std::integer_sequence<int, kRows...>) {
  using Tile = void (*)(const Rows<E>&, const E*, int, Ahead, int, int, const Epilogue<Out>&);
  return std::array<Tile, sizeof...(kRows)>{&gemm_tile<kRows + 1, kVectors, E, Out>...};
}

// In tiles of as equal heights as can be: a height of one or two would leave the multiply-add units waiting on each
// other.
template <int kVectors, class E, class Out>
void gemm_panel_tiles(const Rows<E>& a, int rows, const Panel<E>& panel, int column, const Epilogue<Out>& epilogue) {
  static constexpr auto tiles = gemm_tiles<kVectors, E, Out>(std::make_integer_sequence<int, tile_rows(kVectors)>());
  constexpr int kLine = 64, kPanelTiles = int(kVectors * sizeof(Vec)) / kLine;  // tiles that fetch the panel ahead
  const int count = (rows + tile_rows(kVectors) - 1) / tile_rows(kVectors);
  for (int i = 0, row = 0; i < count; ++i) {
    const int height = rows / count + (i < rows % count ? 1 : 0);
    const bool of_rows = panel.ahead == nullptr || i >= kPanelTiles;
    const E* next = of_rows ? a.at(row + height, 0) : panel.ahead;
    Ahead ahead{reinterpret_cast<const char*>(next), kLine, of_rows};
    if (of_rows)
      ahead.step = height * kDepthStep<E> * sizeof(E);
    else
      ahead.at += std::ptrdiff_t(i) * panel.depth / kDepthStep<E> * kLine;
    tiles[height - 1](a, panel.data, panel.depth, ahead, row, column, epilogue);
    row += height;
  }
}

// One panel's columns of the product, for all rows. Call within a MatrixUnit's life.
template <class E, class Out>
void gemm_panel(const Rows<E>& a, int rows, const Panel<E>& panel, int column, const Epilogue<Out>& epilogue) {
  if (panel.width == kPanel)
    gemm_panel_tiles<kPanelVectors>(a, rows, panel, column, epilogue);
  else
    gemm_panel_tiles<2>(a, rows, panel, column, epilogue);
}
