// From torch's weight layouts, and from rows, to packed ones.
// Compiled once per ISA: included by isa/kernels-inl.h, which says how.

// `width` columns of `count` rows, `ld` apart, as a panel whose k counts the rows: made in `room`, of
// panel_room<E>(count) elements, where they do not lie like one.
inline Panel<float> panel_of_rows(const float* rows, std::ptrdiff_t ld, int count, int width, float* room) {
  if (ld == width) return {rows, count, width, nullptr};
  for (int row = 0; row < count; ++row) std::memcpy(room + row * width, rows + row * ld, width * sizeof(float));
  return {room, count, width, nullptr};
}
// Pairs of rows are woven.
inline Panel<bf16> panel_of_rows(const bf16* rows, std::ptrdiff_t ld, int count, int width, bf16* room) {
  const int depth = depth_of<bf16>(count);
  const auto bits = [&](int row, int column) PVT_LAMBDA {
    VecHalf half{};
    if (row < count) std::memcpy(&half, rows + row * ld + column, sizeof half);
    return widen(half);
  };
  for (int row = 0; row < depth; row += 2)
    for (int column = 0; column < width; column += kLanes) {
      const VecBits pairs = bits(row, column) | bits(row + 1, column) << 16;
      std::memcpy(room + std::ptrdiff_t(row) * width + 2 * column, &pairs, sizeof pairs);
    }
  return {room, depth, width, nullptr};
}
template <class E>
constexpr std::size_t panel_room(int rows) {
  return std::size_t(depth_of<E>(rows)) * kPanel;
}

// place(0), place(1), ...
template <class Place>
Buffer<std::ptrdiff_t> offsets(int count, const Place& place) {
  Buffer<std::ptrdiff_t> found(count);
  for (int i = 0; i < count; ++i) found[i] = place(i);
  return found;
}

// Are `count` offsets those of neighbours?
inline bool neighbours(const std::ptrdiff_t* at, int count) {
  bool are = at[0] >= 0;
  for (int i = 1; i < count; ++i) are &= at[i] == at[0] + i;
  return are;
}

// `count` elements, at most kGathered, in the type of products.
template <class E>
PVT_INLINE void convert(const E* from, int count, E* to) {
  std::memcpy(to, from, count * sizeof(E));
}
template <class E, class T>
PVT_INLINE void convert(const T* from, int count, E* to) {
  for (int i = 0; i < count; i += kLanes) {
    const int some = std::min(kLanes, count - i);
    store_columns(to + i, load_columns(from + i, some), some);
  }
}

// to (rows, ld) = from[row_at[r] + column_at[c]], left as it is where either is negative: a block of a matrix or of its
// transposed.
constexpr int kGathered = 32;  // rows at most
template <class E, class T>
void gather(const T* from, const std::ptrdiff_t* row_at, int rows, const std::ptrdiff_t* column_at, int columns, E* to,
            int ld) {
  if (neighbours(column_at, columns)) {
    for (int r = 0; r < rows; ++r)
      if (row_at[r] >= 0) convert(from + row_at[r] + column_at[0], columns, to + r * ld);
  } else if (neighbours(row_at, rows)) {
    for (int c = 0; c < columns; ++c) {
      if (column_at[c] < 0) continue;
      E line[kGathered];
      convert(from + row_at[0] + column_at[c], rows, line);
      for (int r = 0; r < rows; ++r) to[r * ld + c] = line[r];
    }
  } else {
    for (int c = 0; c < columns; ++c)
      for (int r = 0; r < rows; ++r)
        if (row_at[r] >= 0 && column_at[c] >= 0) convert(from + row_at[r] + column_at[c], 1, to + r * ld + c);
  }
}

// The packed rows x cols matrix whose element (k, n) torch's `linear` has at row(k) + column(n), zero where either is
// negative. By panels on all threads: each training step packs all weights anew.
template <class E, class T, class Row, class Column>
PackedMatrix<E> pack(const Linear& linear, int rows, int cols, const Row& row, const Column& column) {
  constexpr std::size_t kMinPacked = 1 << 14;  // elements that are worth other threads
  PackedMatrix<E> packed(rows, cols);
  const Buffer<std::ptrdiff_t> row_at = offsets(rows, row), column_at = offsets(cols, column);
  const T* weight = static_cast<const T*>(linear.weight);
  const PanelLayout<E>& layout = packed.layout;
  const auto pack_panel = [&](std::int64_t p) {
    const int first = int(p) * kPanel, width = layout.width(int(p)), count = std::min(width, cols - first);
    E* to = packed.data.data() + std::size_t(first) * layout.depth;
    std::memset(to, 0, std::size_t(layout.depth) * width * sizeof(E));
    for (int k = 0; k < rows; k += kGathered, to += kGathered * width) {
      const int height = std::min(kGathered, rows - k);
      const auto gather_to = [&](E* block, int ld) PVT_LAMBDA {
        gather(weight, row_at.data() + k, height, column_at.data() + first, count, block, ld);
      };
      if constexpr (kDepthStep<E> == 1) {
        gather_to(to, width);
      } else {
        E block[kGathered * kPanel] = {};
        gather_to(block, kPanel);
        panel_of_rows(block, kPanel, height, width, to);
      }
    }
  };
  parallel_for_if(layout.size() >= kMinPacked, layout.panels(), pack_panel);
  return packed;
}
// The same with the bias of column n at column_bias(n) of torch's, if that is not negative.
template <class E, class T, class Row, class Column, class Bias>
PackedMatrix<E> pack(const Linear& linear, int rows, int cols, const Row& row, const Column& column,
                     const Bias& column_bias) {
  PackedMatrix<E> packed = pack<E, T>(linear, rows, cols, row, column);
  for (int n = 0; n < cols && linear.bias; ++n)
    if (column_bias(n) >= 0) packed.bias[n] = linear.bias[column_bias(n)];
  return packed;
}

// Offsets in torch's matrices of rows of `size` elements, and of their elements.
constexpr auto rows_of_torch(int size) {
  return [=](int i) { return std::ptrdiff_t(i) * size; };
}
constexpr auto kElements = [](int i) { return std::ptrdiff_t(i); };

// A torch linear (out, in), transposed: rows = in, columns = out.
template <class E, class T>
PackedMatrix<E> pack_linear(const Linear& linear, int out, int in) {
  return pack<E, T>(linear, in, out, kElements, rows_of_torch(in), kElements);
}

// The same as torch has it: rows = out, columns = in, for the gradient of its input.
template <class E, class T>
PackedMatrix<E> pack_backward(const Linear& linear, int out, int in) {
  return pack<E, T>(linear, out, in, rows_of_torch(in), kElements);
}

// A panel's columns of a gradient of `rows` rows to torch's, whose rows are `ld` apart: column j to place(j), padding
// where that is negative. Row by row, as the columns lie near each other there.
template <class Place>
void store_panel(const float* found, int rows, int columns, const Place& place, std::ptrdiff_t ld, float* to) {
  std::ptrdiff_t places[kPanel];
  for (int j = 0; j < columns; ++j) places[j] = place(j);
  for (int n = 0; n < rows; ++n, found += kPanel, to += ld)
    for (int j = 0; j < columns; ++j)
      if (places[j] >= 0) to[places[j]] = found[j];
}

// The rows that a convolution multiplies: patches [dy][dx][channel] (channels last, each pixel padded with zeros to
// `pitch` elements) or [dy][channel][dx].
struct PatchRows {
  int in, kernel;
  bool channels_last;
  int pitch;

  int size() const { return kernel * kernel * pitch; }
  // Where element n of a patch lies among torch's (in, kernel, kernel), or -1 for padding.
  int torch_column(int n) const {
    const int inner = n % (kernel * pitch), dy = n / (kernel * pitch);
    const int dx = channels_last ? inner / pitch : inner % kernel;
    const int c = channels_last ? inner % pitch : inner / kernel;
    return c < in ? (c * kernel + dy) * kernel + dx : -1;
  }
  auto torch_columns() const {
    return [this](int n) { return std::ptrdiff_t(torch_column(n)); };
  }
  auto torch_rows() const { return rows_of_torch(in * kernel * kernel); }
  // A panel's columns of the gradient (out, size), transposed to torch's (out, in, kernel, kernel).
  void store_gradient(const float* found, int out, int panel, int columns, float* to) const {
    store_panel(
        found, out, std::min(columns, size() - panel * kPanel), [&](int j) { return torch_column(panel * kPanel + j); },
        in * kernel * kernel, to);
  }
};

// A torch convolution (out, in, kernel, kernel), transposed.
template <class E, class T>
PackedMatrix<E> pack_conv(const Linear& conv, int out, const PatchRows& patches) {
  return pack<E, T>(conv, patches.size(), out, patches.torch_columns(), patches.torch_rows(), kElements);
}
// The same as torch has it.
template <class E, class T>
PackedMatrix<E> pack_conv_backward(const Linear& conv, int out, const PatchRows& patches) {
  return pack<E, T>(conv, out, patches.size(), patches.torch_rows(), patches.torch_columns());
}
