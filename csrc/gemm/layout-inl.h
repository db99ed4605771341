// How the operands of matrix multiplication lie in memory: rows in place, weights in packed panels.
// Compiled once per ISA: included by gemm/tile-inl.h or gemm/amx-inl.h.

// Columns of a packed panel, and of a narrow one, which the last may be.
constexpr int kPanelVectors = Target::kPanelVectors;
constexpr int kPanel = kPanelVectors * kLanes, kNarrow = 2 * kLanes;

// k is padded with zero weights to a multiple of this, and rows must be readable (and finite) that far. More than 1 for
// an element type whose products are summed by one instruction: the header with that product says how many.
template <class E>
constexpr int kDepthStep = 1;

// k of `rows` rows, padded.
template <class E>
constexpr int depth_of(int rows) {
  return int(round_up(rows, kDepthStep<E>));
}

// Work items have at least this many rows,
constexpr int kMinRows = 12;
// and begin at multiples of this many of an image's rows, so that none ends with a tile that is mostly empty.
constexpr int kRowStep = Target::kMatrixUnit ? 16 : 1;

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
  PanelLayout(int rows, int cols) : depth(depth_of<E>(rows)), columns(int(row_width(cols))) {}

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
  // With no values yet, and no bias.
  PackedMatrix(int rows, int cols)
      : layout(rows, cols), data(Buffer<E>::uninitialised(layout.size())), bias(layout.columns) {}

  int panels() const { return layout.panels(); }
  Panel<E> panel(int p) const { return layout.panel(data.data(), p); }
};
