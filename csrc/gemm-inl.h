// Matrix multiplication: rows in place times packed weights, with the epilogue applied to the accumulators.
//
// The element type E of rows and weights is float, or bf16 where the ISA multiplies bf16 pairs (bf16 weights are
// otherwise widened when packed). Accumulation is in float, over k in order: a row's result does not depend on the
// tile or the thread that computes it.

// A register tile is kRows x kVectors vectors of accumulators, fed per k by kVectors loads of the panel and kRows
// broadcasts. It must fit the registers and, as cores that share their front end with a second hardware thread decode
// about three instructions a cycle, have few instructions per multiply-add. Rows of the largest tile:
//   32 registers, 4 vectors:  6 x 4 accumulators + 4 of the panel + 1 broadcast = 29; 34 instructions for 24
//   32 registers, 2 vectors: 14 x 2 + 2 + 1 = 31; 44 for 28: for the last panel of a matrix, where 4 are too wide
//   16 registers, 2 vectors:  6 x 2 + 2 + 1 = 15; 20 for 12
//   scalar, 16 registers of 4 lanes, one more for the product:  4 x 2 + 2 + 1 + 1 = 12
//   NEON, 32 registers, a row's value in a register of its own, of which fmla takes one lane:  10 x 2 + 2 + 10; at
//   12 x 2 GCC 12 spills accumulators inside the loop, as it loads the rows' values ahead
#ifdef PVT_NEON
constexpr int tile_rows(int) { return 10; }
#else
constexpr int tile_rows(int vectors) { return vectors == 4 ? 6 : kLanes == 16 ? 14 : kLanes == 8 ? 6 : 4; }
#endif

// Columns of a packed panel, and of a narrow one, which the last may be.
#if PVT_LANES == 16 && !defined(PVT_AMX)
constexpr int kPanelVectors = 4;
#else
constexpr int kPanelVectors = 2;
#endif
constexpr int kPanel = kPanelVectors * kLanes, kNarrow = 2 * kLanes;

// k is padded with zero weights to a multiple of this, and rows must be readable (and finite) that far.
template <class E>
constexpr int kDepthStep = 1;
#ifdef PVT_AMX
template <>
inline constexpr int kDepthStep<bf16> = 32;  // one tile: 16 rows of 2 x 16
#elif defined(PVT_HAS_DOT_BF16)
template <>
inline constexpr int kDepthStep<bf16> = 2;
#endif

// Work items have at least this many rows,
constexpr int kLeastRows = 12;
// and begin at multiples of this many of an image's rows, so that none ends with a tile that is mostly empty.
#ifdef PVT_AMX
constexpr int kRowStep = 16;
#else
constexpr int kRowStep = 1;
#endif

// Row scratch is laid out with this width for k columns, so that a GEMM's output can be the next one's input with its
// zero columns as the padding of k,
constexpr std::size_t row_width(std::size_t columns) { return round_up(columns, kNarrow); }
// and with this many rows for m of them: the matrix unit reads whole tiles, wherever among them an image begins.
constexpr std::size_t row_room(std::size_t rows) { return round_up(rows + kRowStep - 1, 16); }

// One panel of a packed matrix: [depth][width], or for bf16 pairs [depth / 2][width][2].
template <class E>
struct Panel {
  const E* data;
  int depth, width;
  const E* ahead;  // the panel that is likely wanted next, to be fetched into cache meanwhile, or null

  // k of [begin, end), both multiples of kDepthStep.
  Panel part(int begin, int end) const {
    return {data + std::ptrdiff_t(begin) * width, end - begin, width,
            end < depth ? data + std::ptrdiff_t(end) * width : ahead};
  }
};

// A of a GEMM: rows of `ld` elements, or blocks of `block` columns, `block_stride` elements apart, each of such rows.
// Rows of a long k in one piece lie pages apart.
template <class E>
struct Rows {
  const E* data;
  std::ptrdiff_t ld;
  int block = 1 << 30;
  std::ptrdiff_t block_stride = 0;

  PVT_INLINE const E* at(int row, int k) const {
    return k < block ? data + row * ld + k : data + (k / block) * block_stride + row * ld + k % block;
  }
};

// Rows of a dense matrix of `width` columns, from row `first` on.
template <class E>
Rows<E> rows_of(const E* matrix, std::int64_t first, std::size_t width) {
  return {matrix + first * std::ptrdiff_t(width), std::ptrdiff_t(width)};
}

// How a depth x columns matrix lies in memory: panels of kPanel columns, the last one narrow where that suffices.
template <class E>
struct PanelLayout {
  int depth = 0, columns = 0;  // both padded

  PanelLayout() = default;
  PanelLayout(int rows, int cols) : depth(int(round_up(rows, kDepthStep<E>))), columns(int(row_width(cols))) {}

  std::size_t size() const { return std::size_t(depth) * columns; }
  int panels() const { return (columns + kPanel - 1) / kPanel; }
  int width(int p) const { return std::min(kPanel, columns - p * kPanel); }
  Panel<E> panel(const E* data, int p) const {
    const E* start = data + std::size_t(p) * kPanel * depth;
    return {start, depth, width(p), p + 1 < panels() ? start + std::size_t(kPanel) * depth : nullptr};
  }
  // Where element (k, n) lies.
  std::size_t index(int k, int n) const {
    const int p = n / kPanel, column = n % kPanel;
    const std::size_t start = std::size_t(p) * kPanel * depth;
    if constexpr (kDepthStep<E> == 1) return start + std::size_t(k) * width(p) + column;
    return start + std::size_t(k / 2) * 2 * width(p) + column * 2 + k % 2;
  }
};

// Weights: B of a GEMM, with the bias of its columns.
template <class E>
struct PackedMatrix {
  PanelLayout<E> layout;
  Buffer<E> data;
  Buffer<float> bias;

  PackedMatrix() = default;
  PackedMatrix(int rows, int cols) : layout(rows, cols), data(layout.size()), bias(layout.columns) {}

  int panels() const { return layout.panels(); }
  Panel<E> panel(int p) const { return layout.panel(data.data(), p); }
};

PVT_INLINE void assign(float& to, float value) { to = value; }
PVT_INLINE void assign(bf16& to, float value) { store_first(&to, splat(value), 1); }

template <int kRows, int kVectors, class Body>
PVT_INLINE void for_each(const Vec (&)[kRows][kVectors], const Body& body) {
  unrolled<kRows>([&](auto r) PVT_LAMBDA { unrolled<kVectors>([&](auto i) PVT_LAMBDA { body(r, i); }); });
}

// What happens to a sum, bias added, before it is stored: * multiply, ReLU, residual + scale * it.
template <class Out>
struct Epilogue {
  Out* out;                     // of row 0, column 0
  std::ptrdiff_t ld;            // elements between rows
  const int* places = nullptr;  // of the rows, where they are not stored in order
  int columns;                  // stored columns; the rest of the last panel is dropped
  const float* bias;
  float multiply = 1;
  bool relu = false;
  const Out* residual = nullptr;  // laid out as `out`
  float residual_scale = 1;

  PVT_INLINE std::ptrdiff_t place(int row) const { return (places ? places[row] : row) * ld; }

  // Rows from `row` on and columns from `column` on of the product. One branch for all rows, and nothing that calls a
  // function while sums wait in registers.
  template <int kRows, int kVectors>
  PVT_INLINE void finish(int row, int column, const Vec (&sums)[kRows][kVectors]) const {
    if (__builtin_expect(columns - column < kVectors * kLanes, 0)) {
      float waiting[kRows][kVectors * kLanes];
      for_each(sums, [&](auto r, auto i) PVT_LAMBDA { store(waiting[r] + i * kLanes, sums[r][i]); });
      for (int r = 0; r < kRows; ++r) finish_some(row + r, column, waiting[r]);
    } else if (residual) {
      for_each(sums, [&](auto r, auto i) PVT_LAMBDA {
        const std::ptrdiff_t at = place(row + r) + column + i * kLanes;
        store(out + at, load(residual + at) + finished(sums[r][i]) * residual_scale);
      });
    } else if (relu || multiply != 1) {
      for_each(sums, [&](auto r, auto i)
                         PVT_LAMBDA { store(out + place(row + r) + column + i * kLanes, finished(sums[r][i])); });
    } else {
      for_each(sums, [&](auto r, auto i) PVT_LAMBDA { store(out + place(row + r) + column + i * kLanes, sums[r][i]); });
    }
  }

  // The columns from `column` on, too few for a tile.
  __attribute__((noinline)) void finish_some(int row, int column, const float* sums) const {
    for (; column < columns; column += kLanes, sums += kLanes) {
      const int count = std::min(kLanes, columns - column);
      const std::ptrdiff_t at = place(row) + column;
      Vec x = finished(load(sums));
      if (residual) x = load_first(residual + at, count) + x * residual_scale;
      store_first(out + at, x, count);
    }
  }

  // Is storing all that happens to columns up to `end`?
  bool plain(int end) const { return !places && !relu && !residual && multiply == 1 && end <= columns; }

  PVT_INLINE Vec finished(Vec v) const {
    if (multiply != 1) v *= multiply;
    return relu ? max(Vec{}, v) : v;  // in this order: NaN stays NaN
  }
};

// Rows of `ld` columns, all stored.
template <class Out>
Epilogue<Out> store_rows(Out* out, std::size_t ld, const float* bias) {
  Epilogue<Out> epilogue{};
  epilogue.out = out;
  epilogue.ld = ld;
  epilogue.columns = int(ld);
  epilogue.bias = bias;
  return epilogue;
}

// residual + scale * rows of `columns` columns, all dense.
template <class Out>
Epilogue<Out> add_rows(Out* out, const Out* residual, float scale, int columns, const float* bias) {
  Epilogue<Out> epilogue = store_rows(out, columns, bias);
  epilogue.residual = residual;
  epilogue.residual_scale = scale;
  return epilogue;
}

// Lines of the panel ahead, one per step of k: memory is slow enough that a core waits for weights it did not ask for
// in time, and the hardware follows a single long stream only.
struct Ahead {
  const char* at;
  PVT_INLINE void fetch() {
    __builtin_prefetch(at, 0, 2);
    at += 64;
  }
};
struct NothingAhead {
  PVT_INLINE void fetch() {}
};

template <int kRows, int kVectors, class Fetch>
PVT_INLINE void multiply_tile(const float* a, std::ptrdiff_t lda, const float* b, int depth, Fetch& ahead,
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

#if defined(PVT_HAS_DOT_BF16) && !defined(PVT_AMX)
template <int kRows, int kVectors, class Fetch>
PVT_INLINE void multiply_tile(const bf16* a, std::ptrdiff_t lda, const bf16* b, int depth, Fetch& ahead,
                              Vec (&acc)[kRows][kVectors]) {
#pragma GCC unroll 2
  for (int k = 0; k < depth; k += 2, b += 2 * kVectors * kLanes) {
    VecPairs panel[kVectors];
    unrolled<kVectors>([&](auto i) PVT_LAMBDA { panel[i] = load_pairs(b + 2 * i * kLanes); });
    ahead.fetch();
    unrolled<kRows>([&](auto r) PVT_LAMBDA {
      const VecPairs pair = splat_pair(a + r * lda + k);
      unrolled<kVectors>([&](auto i) PVT_LAMBDA { acc[r][i] = dot(acc[r][i], pair, panel[i]); });
    });
  }
}
#endif

// Depth that is summed in registers before it is added to the rest: a sum of n terms in a row errs by about sqrt(n)
// roundings of its size, a sum of short sums by far less, and the long products here (k up to 4096) would otherwise err
// more than a BLAS does. Products of bf16 need it not: their own rounding is larger.
template <class E>
constexpr int kDepthBlock = std::is_same_v<E, float> ? 256 : 1 << 30;

// k of [begin, end).
template <int kRows, int kVectors, class E, class Fetch>
PVT_INLINE void multiply_block(const Rows<E>& a, int row, const E* b, int begin, int end, Fetch& ahead,
                               Vec (&acc)[kRows][kVectors]) {
  for (int k = begin; k < end; k += a.block)
    multiply_tile<kRows, kVectors>(a.at(row, k), a.ld, b + std::ptrdiff_t(k) * kVectors * kLanes,
                                   std::min(a.block, end - k), ahead, acc);
}

template <int kRows, int kVectors, class E, class Out, class Fetch>
void gemm_tile(const Rows<E>& a, const E* b, int depth, Fetch ahead, int row, int column,
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

template <int kVectors, class Fetch, class E, class Out, int... kRows>
constexpr auto gemm_tiles(std::integer_sequence<int, kRows...>) {
  using Tile = void (*)(const Rows<E>&, const E*, int, Fetch, int, int, const Epilogue<Out>&);
  return std::array<Tile, sizeof...(kRows)>{&gemm_tile<kRows + 1, kVectors, E, Out, Fetch>...};
}

// In tiles of as equal heights as can be: a height of one or two would leave the multiply-add units waiting on each
// other. The first tiles fetch the panel ahead: the last panel, which may be narrow, has none.
template <int kVectors, class E, class Out>
void gemm_panel_tiles(const Rows<E>& a, int rows, const Panel<E>& panel, int column, const Epilogue<Out>& epilogue) {
  constexpr auto kHeights = std::make_integer_sequence<int, tile_rows(kVectors)>();
  static constexpr auto tiles = gemm_tiles<kVectors, NothingAhead, E, Out>(kHeights);
  const int count = (rows + tile_rows(kVectors) - 1) / tile_rows(kVectors);
  for (int i = 0, row = 0; i < count; ++i) {
    const int height = rows / count + (i < rows % count ? 1 : 0);
    if constexpr (kVectors == kPanelVectors) {
      static constexpr auto fetching_tiles = gemm_tiles<kVectors, Ahead, E, Out>(kHeights);
      const std::size_t steps = panel.depth / kDepthStep<E>;  // a line in each
      if (panel.ahead && i < int(kVectors * sizeof(Vec) / 64)) {
        const Ahead ahead{reinterpret_cast<const char*>(panel.ahead) + i * steps * 64};
        fetching_tiles[height - 1](a, panel.data, panel.depth, ahead, row, column, epilogue);
        row += height;
        continue;
      }
    }
    tiles[height - 1](a, panel.data, panel.depth, {}, row, column, epilogue);
    row += height;
  }
}

#ifdef PVT_AMX
template <class Out>
void gemm_panel(const Rows<bf16>& a, int rows, const Panel<bf16>& panel, int column, const Epilogue<Out>& epilogue);
#endif

// One panel's columns of the product, for all rows. Call within a MatrixUnit's life.
template <class E, class Out>
void gemm_panel(const Rows<E>& a, int rows, const Panel<E>& panel, int column, const Epilogue<Out>& epilogue) {
  if (panel.width == kPanel)
    gemm_panel_tiles<kPanelVectors>(a, rows, panel, column, epilogue);
  else
    gemm_panel_tiles<2>(a, rows, panel, column, epilogue);
}

// out = epilogue(a * b), a (rows, >= depth).
template <class E, class Out>
void gemm(const Rows<E>& a, int rows, const PackedMatrix<E>& b, const Epilogue<Out>& epilogue) {
  for (int p = 0; p < b.panels(); ++p) gemm_panel(a, rows, b.panel(p), p * kPanel, epilogue);
}
