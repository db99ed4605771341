// Matrix multiplication: rows in place times packed weights, with the epilogue applied to the accumulators.
//
// The element type E of rows and weights is float, or bf16 where the ISA multiplies bf16 pairs (bf16 weights are
// otherwise widened when packed). Accumulation is in float, over k in order: a row's result does not depend on the
// tile or the thread that computes it.

// Columns of a packed panel: two vectors, so that a tile needs two loads per kTileRows * 2 multiply-adds.
constexpr int kPanel = 2 * kLanes;

// Rows of the largest register tile. 32 registers: 14 x 2 accumulators + 2 of the panel + 1 broadcast; 16 registers:
// 6 x 2 + 2 + 1; the scalar ISA's 16 registers of 4 lanes need a spare for the product: 4 x 2 + 2 + 1 + 1.
#ifdef PVT_NEON
// 32 registers of 4 lanes: 10 x 2 + 2 + 10, a row's value being loaded into a register of its own, of which fmla takes
// one lane. At 12 x 2 GCC 12 spills accumulators inside the loop, as it loads the rows' values ahead.
constexpr int kTileRows = 10;
#else
constexpr int kTileRows = kLanes == 16 ? 14 : kLanes == 8 ? 6 : 4;
#endif

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

// Row scratch is laid out with this width for k columns: a whole number of panels, so that a GEMM's output can be the
// next one's input with its zero columns as the padding of k.
constexpr std::size_t row_width(std::size_t columns) { return round_up(columns, kPanel); }
// and with this many rows for m of them: the matrix unit reads whole tiles.
constexpr std::size_t row_room(std::size_t rows) { return round_up(rows, 16); }

// B of a GEMM: `depth` x `columns` as panels of kPanel columns, each [depth][kPanel], or for bf16 pairs
// [depth / 2][kPanel][2].
template <class E>
struct PackedMatrix {
  int depth = 0, columns = 0;
  Buffer<E> data;
  Buffer<float> bias;  // padded to whole panels

  PackedMatrix() = default;
  PackedMatrix(int rows, int cols)
      : depth(int(round_up(rows, kDepthStep<E>))), columns(cols), data(size(rows, cols)), bias(row_width(cols)) {}

  static std::size_t size(int rows, int cols) { return round_up(rows, kDepthStep<E>) * row_width(cols); }
  int panels() const { return int(row_width(columns) / kPanel); }
  const E* panel(int p) const { return data.data() + std::size_t(p) * depth * kPanel; }
};

// Where (k, n) of a packed matrix of that depth lies.
template <class E>
PVT_INLINE std::size_t packed_index(int depth, int k, int n) {
  const std::size_t start = std::size_t(n / kPanel) * depth * kPanel;
  if constexpr (kDepthStep<E> == 1) return start + std::size_t(k) * kPanel + n % kPanel;
  return start + std::size_t(k / 2) * 2 * kPanel + (n % kPanel) * 2 + k % 2;
}

PVT_INLINE void assign(float& to, float value) { to = value; }
PVT_INLINE void assign(bf16& to, float value) { store_first(&to, splat(value), 1); }

// What happens to an accumulator, bias added, before it is stored: * multiply, ReLU, residual + scale * it.
template <class Out>
struct Epilogue {
  Out* out;                      // of row 0, column 0
  std::ptrdiff_t ld;             // elements between rows, unless
  const int* offsets = nullptr;  // gives each row's place
  int columns;                   // stored columns; the rest of the last panel is dropped
  const float* bias;
  float multiply = 1;
  bool relu = false;
  const Out* residual = nullptr;  // laid out as `out`
  float residual_scale = 1;

  PVT_INLINE std::ptrdiff_t place(int row) const { return offsets ? offsets[row] : row * ld; }

  PVT_INLINE void finish(int row, int column, Vec v0, Vec v1) const {
    if (multiply != 1) v0 *= multiply, v1 *= multiply;
    // max(0, v), in this order: NaN stays NaN
    if (relu) v0 = max(Vec{}, v0), v1 = max(Vec{}, v1);
    const std::ptrdiff_t at = place(row) + column;
    const int count = columns - column;
    if (__builtin_expect(count >= kPanel, 1)) {
      if (residual) {
        v0 = load(residual + at) + v0 * residual_scale;
        v1 = load(residual + at + kLanes) + v1 * residual_scale;
      }
      store(out + at, v0);
      store(out + at + kLanes, v1);
      return;
    }
    finish_part(at, count, v0);
    if (count > kLanes) finish_part(at + kLanes, count - kLanes, v1);
  }

  PVT_INLINE void finish_part(std::ptrdiff_t at, int count, Vec v) const {
    const int n = count < kLanes ? count : kLanes;
    if (residual) v = load_first(residual + at, n) + v * residual_scale;
    store_first(out + at, v, n);
  }
};

template <int kRows>
PVT_INLINE void multiply_tile(const float* a, std::ptrdiff_t lda, const float* b, int depth, Vec (&acc)[kRows][2]) {
  for (int k = 0; k < depth; ++k, b += kPanel) {
    const Vec b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec value = splat(a[r * lda + k]);
      acc[r][0] += value * b0;
      acc[r][1] += value * b1;
    }
  }
}

#if defined(PVT_HAS_DOT_BF16) && !defined(PVT_AMX)
template <int kRows>
PVT_INLINE void multiply_tile(const bf16* a, std::ptrdiff_t lda, const bf16* b, int depth, Vec (&acc)[kRows][2]) {
  for (int k = 0; k < depth; k += 2, b += 2 * kPanel) {
    const VecPairs b0 = load_pairs(b), b1 = load_pairs(b + kPanel);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const VecPairs pair = splat_pair(a + r * lda + k);
      acc[r][0] = dot(acc[r][0], pair, b0);
      acc[r][1] = dot(acc[r][1], pair, b1);
    }
  }
}
#endif

// Depth that is summed in registers before it is added to the rest: a sum of n terms in a row errs by about sqrt(n)
// roundings of its size, a sum of short sums by far less, and the long products here (k up to 4096) would otherwise err
// more than a BLAS does. Products of bf16 need it not: their own rounding is larger.
template <class E>
constexpr int kDepthBlock = std::is_same_v<E, float> ? 256 : 1 << 30;

template <int kRows, class E, class Out>
void gemm_tile(const E* a, std::ptrdiff_t lda, const E* b, int depth, int row, int column,
               const Epilogue<Out>& epilogue) {
  Vec acc[kRows][2] = {};
  const int head = depth < kDepthBlock<E> ? depth : kDepthBlock<E>;
  multiply_tile<kRows>(a, lda, b, head, acc);
  for (int k = head; k < depth; k += kDepthBlock<E>) {
    Vec block[kRows][2] = {};
    multiply_tile<kRows>(a + k, lda, b + std::ptrdiff_t(k) * kPanel, std::min(kDepthBlock<E>, depth - k), block);
    for (int r = 0; r < kRows; ++r) acc[r][0] += block[r][0], acc[r][1] += block[r][1];
  }
  const Vec bias0 = load(epilogue.bias + column), bias1 = load(epilogue.bias + column + kLanes);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) epilogue.finish(row + r, column, acc[r][0] + bias0, acc[r][1] + bias1);
}

template <class E, class Out, int... kRows>
constexpr auto gemm_tiles(std::integer_sequence<int, kRows...>) {
  using Tile = void (*)(const E*, std::ptrdiff_t, const E*, int, int, int, const Epilogue<Out>&);
  return std::array<Tile, sizeof...(kRows)>{&gemm_tile<kRows + 1, E, Out>...};
}

#ifdef PVT_AMX
template <class Out>
void gemm_panel(const bf16* a, std::ptrdiff_t lda, int rows, const bf16* b, int depth, int column,
                const Epilogue<Out>& epilogue);
#endif

// One panel's columns of the product for all rows, in tiles of as equal heights as can be: a height of one or two would
// leave the multiply-add units waiting on each other.
template <class E, class Out>
void gemm_panel(const E* a, std::ptrdiff_t lda, int rows, const E* b, int depth, int column,
                const Epilogue<Out>& epilogue) {
  static constexpr auto tiles = gemm_tiles<E, Out>(std::make_integer_sequence<int, kTileRows>());
  const int count = (rows + kTileRows - 1) / kTileRows;
  for (int i = 0, row = 0; i < count; ++i) {
    const int height = rows / count + (i < rows % count ? 1 : 0);
    tiles[height - 1](a + row * lda, lda, b, depth, row, column, epilogue);
    row += height;
  }
}

// out = epilogue(a * b), a (rows, >= depth) with row stride lda. Call within a MatrixUnit's life.
template <class E, class Out>
void gemm(const E* a, std::ptrdiff_t lda, int rows, const PackedMatrix<E>& b, const Epilogue<Out>& epilogue) {
  for (int p = 0; p < b.panels(); ++p) gemm_panel(a, lda, rows, b.panel(p), b.depth, p * kPanel, epilogue);
}
