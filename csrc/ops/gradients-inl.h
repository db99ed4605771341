// What the backward of several ops is made of: operands of weights' gradients, sums over rows, LayerNorm's gradient.
// Compiled once per ISA: included by isa/kernels-inl.h, which says how.
//
// The gradient of a matrix is a product whose k counts tokens: the transposed one operand, rows of tokens of one
// channel, times the other, a panel. Both are made of some tokens at a time that stay in cache; sums over tokens are
// taken over fixed parts, added up in a fixed order, so that no bit depends on which thread did what.

// Work items that a backward is cut into, whatever the number of threads where it is small: what is summed in which
// order then does not depend on it.
inline std::int64_t gradient_items() { return std::max(16, 2 * max_threads()); }

// Rows of k tokens, padded.
template <class E>
constexpr int depth_of(int tokens) {
  return int(round_up(tokens, kDepthStep<E>));
}

// The transposed of `rows` rows, `ld` apart, of `columns` elements: as many rows of depth_of(rows), zero past `rows`.
template <class E>
void transpose_rows(const E* from, std::ptrdiff_t ld, int rows, int columns, E* to) {
  constexpr int kBlock = 16;
  const std::ptrdiff_t depth = depth_of<E>(rows);
  for (int column = 0; column < columns; column += kBlock) {
    const int width = std::min(kBlock, columns - column);
    for (int row = 0; row < rows; row += kBlock) {
      const int height = std::min(kBlock, rows - row);
      if (width == kBlock && height == kBlock) {  // whole: loops of known length
        E block[kBlock][kBlock];
        for (int r = 0; r < kBlock; ++r) std::memcpy(block[r], from + (row + r) * ld + column, sizeof block[r]);
        for (int c = 0; c < kBlock; ++c) {
          E* line = to + (column + c) * depth + row;
          for (int r = 0; r < kBlock; ++r) line[r] = block[r][c];
        }
      } else {
        for (int c = column; c < column + width; ++c)
          for (int r = row; r < row + height; ++r) to[c * depth + r] = from[r * ld + c];
      }
    }
  }
  for (int column = 0; column < columns; ++column)
    std::fill(to + column * depth + rows, to + (column + 1) * depth, E{});
}

// Rows of kPanel elements as a panel whose k counts the rows. Floats are one as they stand; pairs of rows are woven in
// `room`, of depth_of(rows) rows.
PVT_INLINE Panel<float> panel_of_rows(const float* rows, int count, float*) { return {rows, count, kPanel, nullptr}; }
PVT_INLINE Panel<bf16> panel_of_rows(const bf16* rows, int count, bf16* room) {
  const int depth = depth_of<bf16>(count);
  const auto bits = [&](int row, int column) PVT_LAMBDA {
    VecHalf half{};
    if (row < count) std::memcpy(&half, rows + std::ptrdiff_t(row) * kPanel + column, sizeof half);
    return widen(half);
  };
  for (int row = 0; row < depth; row += 2)
    for (int column = 0; column < kPanel; column += kLanes) {
      const VecBits pairs = bits(row, column) | bits(row + 1, column) << 16;
      std::memcpy(room + std::ptrdiff_t(row) * kPanel + 2 * column, &pairs, sizeof pairs);
    }
  return {room, depth, kPanel, nullptr};
}
// Elements of that room.
template <class E>
constexpr std::size_t panel_room(int rows) {
  return std::is_same_v<E, float> ? 0 : std::size_t(depth_of<E>(rows)) * kPanel;
}

// sums (rows of `a`, kPanel) += a * panel.
template <class E>
void add_product(const Rows<E>& a, int rows, const Panel<E>& panel, const float* zeros, float* sums) {
  Epilogue<float> epilogue = store_rows(sums, kPanel, zeros);
  epilogue.residual = sums;
  gemm_panel(a, rows, panel, 0, epilogue);
}

// to[i] = sum over `parts` of from[part * stride + i], in order; may be null: then nothing.
inline void add_parts(const float* from, std::int64_t parts, std::size_t stride, std::size_t count, float* to) {
  if (to == nullptr) return;
  std::memcpy(to, from, count * sizeof(float));
  for (std::int64_t part = 1; part < parts; ++part)
    for (std::size_t i = 0; i < count; ++i) to[i] += from[part * stride + i];
}

// The gradient of LayerNorm of a row x: of its weight and bias added to `grad_weight` and `grad_bias`, of the row
// handed over in vectors, as take(column, count, gradient), count < kLanes for the last of some widths. grad(column): a
// vector of the output's gradient, zero past the channels. Two passes for the statistics, as the forward's, and one sum
// more.
template <class In, class Grad, class Take>
PVT_INLINE void norm_gradient(const PackedNorm& norm, const In* x, const Grad& grad, float* grad_weight,
                              float* grad_bias, const Take& take) {
  const int channels = norm.channels;
  const float first = to_float(x[0]), share = 1.0f / channels;
  const auto columns = [&](const auto& body) PVT_LAMBDA {
    int c = 0;
    for (; c + kLanes <= channels; c += kLanes) body(c, kLanes, load(x + c));
    if (c < channels) body(c, channels - c, load_first(x + c, channels - c));
  };
  const auto total = [](Vec v) PVT_LAMBDA {
    float lanes[kLanes], sum = 0;
    store(lanes, v);
    for (float lane : lanes) sum += lane;
    return sum;
  };
  const auto inside = [](int count) PVT_LAMBDA { return count == kLanes ? splat(1) : first_lanes(count); };
  Vec sums{};
  columns([&](int, int count, Vec v) PVT_LAMBDA { sums += (v - first) * inside(count); });
  const float mean = first + total(sums) * share;
  sums = Vec{};
  columns([&](int, int count, Vec v) PVT_LAMBDA {
    const Vec d = (v - mean) * inside(count);
    sums += d * d;
  });
  const float variance = total(sums) * share, scale = 1.0f / std::sqrt(variance + norm.eps) + variance * 0.0f;
  Vec plain{}, along{};
  columns([&](int c, int count, Vec v) PVT_LAMBDA {
    const Vec g = grad(c), d = (v - mean) * scale * inside(count), weighted = g * load(norm.weight.data() + c);
    store(grad_weight + c, load(grad_weight + c) + g * d);
    store(grad_bias + c, load(grad_bias + c) + g);
    plain += weighted;
    along += weighted * d;
  });
  const float plain_mean = total(plain) * share, along_mean = total(along) * share;
  columns([&](int c, int count, Vec v) PVT_LAMBDA {
    const Vec d = (v - mean) * scale;
    take(c, count, (grad(c) * load(norm.weight.data() + c) - plain_mean - d * along_mean) * scale);
  });
}

// to[c] = value for a vector of columns, or the first `count`.
template <class T>
PVT_INLINE void store_columns(T* to, Vec value, int count) {
  count == kLanes ? store(to, value) : store_first(to, value, count);
}
template <class T>
PVT_INLINE Vec load_columns(const T* from, int count) {
  return count == kLanes ? load(from) : load_first(from, count);
}

// out (rows, width) = scale * x (rows, channels), zero past the channels.
template <class T, class E>
void scale_rows(const T* x, int rows, int channels, float scale, E* out, std::size_t width) {
  for (int r = 0; r < rows; ++r, x += channels, out += width) {
    int c = 0;
    for (; c + kLanes <= channels; c += kLanes) store(out + c, load(x + c) * scale);
    for (; c < int(width); c += kLanes) store(out + c, c < channels ? load_first(x + c, channels - c) * scale : Vec{});
  }
}
