// What the backward of several ops is made of: operands of weights' gradients, sums over rows, LayerNorm's gradient.
// Compiled once per ISA: included by isa/kernels-inl.h, which says how.
//
// The gradient of a matrix is a product whose k counts tokens: the transposed one operand, rows of tokens of one
// channel, times the other, a panel. Both are made of some tokens at a time that stay in cache; sums over tokens are
// taken over fixed parts, added up in a fixed order, so that no bit depends on which thread did what.

// Work items that a backward is cut into, whatever the number of threads where it is small: what is summed in which
// order then does not depend on it.
inline std::int64_t gradient_items() { return std::max(16, 2 * max_threads()); }

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

// sums (rows of `a`, columns of the panel), `ld` apart, += a * panel.
template <class E>
void add_product(const Rows<E>& a, int rows, const Panel<E>& panel, const float* zeros, float* sums,
                 std::size_t ld = kPanel) {
  Epilogue<float> epilogue = store_rows(sums, ld, zeros);
  epilogue.columns = panel.width;
  epilogue.residual = sums;
  gemm_panel(a, rows, panel, 0, epilogue);
}

// The gradient of a matrix: the transposed of (tokens, rows) times (tokens, columns). The first comes transposed, in
// bands of tokens of an image; both widths are whole narrow panels.
template <class E>
class MatrixGradient {
 public:
  // tokens: of each image.
  MatrixGradient(std::int64_t images, std::int64_t tokens, std::size_t rows, std::size_t columns)
      : images_(images), tokens_(tokens), rows_(rows), columns_(columns) {
    panels_ = (columns + kPanel - 1) / kPanel, groups_ = (panels_ + kGroup - 1) / kGroup;
    parts_ =
        std::clamp<std::int64_t>((gradient_items() + groups_ - 1) / groups_, 1, std::max<std::int64_t>(bands(), 1));
  }

  std::size_t transposed_size() const { return bands() * band_size(); }
  std::size_t sums_size() const { return parts_ * panels_ * rows_ * kPanel; }

  // From dense rows of as many elements as the gradient has rows.
  void transpose(const E* from, E* transposed) const {
    parallel_for(bands(), [&](std::int64_t band) {
      transpose_rows(from + (image(band) * tokens_ + first(band)) * rows_, rows_, count(band), int(rows_),
                     transposed + band * band_size());
    });
  }

  // finish(panel, its columns, (rows, kPanel) of the gradient), on all threads. b: rows, `ld` apart, those of another
  // image `image_size` further.
  template <class Finish>
  void run(const E* transposed, const E* b, std::ptrdiff_t ld, std::ptrdiff_t image_size, const float* zeros,
           float* sums, const Finish& finish) const {
    const std::size_t size = rows_ * kPanel;
    parallel_for(groups_ * parts_, [&](std::int64_t item) {
      const MatrixUnit unit;
      const std::int64_t part = item % parts_;
      const int begin = int(item / parts_ * panels_ / groups_), end = int((item / parts_ + 1) * panels_ / groups_);
      E* room = std::get<0>(thread_scratch().take(array<E>(kGroup * panel_room<E>(kTokens))));
      const auto sums_of = [&](int panel) { return sums + (panel * parts_ + part) * size; };
      for (int panel = begin; panel < end; ++panel) std::memset(sums_of(panel), 0, size * sizeof(float));
      for (std::int64_t band = part * bands() / parts_; band < (part + 1) * bands() / parts_; ++band) {
        const int tokens = count(band), depth = depth_of<E>(tokens);
        Panel<E> panels[kGroup];
        for (int panel = begin; panel < end; ++panel)
          panels[panel - begin] =
              panel_of_rows(b + image(band) * image_size + first(band) * ld + panel * kPanel, ld, tokens,
                            columns(panel), room + (panel - begin) * panel_room<E>(kTokens));
        for_rows_and_panels<E>(int(rows_), depth, begin, end, [&](int row, int rows, int panel) {
          add_product(Rows<E>{transposed + band * band_size() + std::ptrdiff_t(row) * depth, depth}, rows,
                      panels[panel - begin], zeros, sums_of(panel) + row * kPanel);
        });
      }
    });
    parallel_for(panels_, [&](std::int64_t panel) {
      float* total = sums + panel * parts_ * size;
      fold_parts(total, parts_, size, size);
      finish(int(panel), columns(panel), total);
    });
  }

 private:
  static constexpr int kTokens = 256;  // of a band
  static constexpr int kGroup = 4;     // panels that are worked on together

  std::int64_t image_bands() const { return (tokens_ + kTokens - 1) / kTokens; }
  std::int64_t bands() const { return images_ * image_bands(); }
  std::int64_t image(std::int64_t band) const { return band / image_bands(); }
  std::int64_t first(std::int64_t band) const { return band % image_bands() * kTokens; }
  std::size_t band_size() const { return row_room(rows_) * depth_of<E>(kTokens); }
  int count(std::int64_t band) const { return int(std::min<std::int64_t>(kTokens, tokens_ - first(band))); }
  int columns(std::int64_t panel) const { return int(std::min<std::size_t>(kPanel, columns_ - panel * kPanel)); }

  std::int64_t images_, tokens_;
  std::size_t rows_, columns_;
  std::int64_t panels_, groups_, parts_;
};

// Rows that are summed before they are added to the rest: see kDepthBlock.
constexpr int kRowsOfSum = 8;

// sums += row, both of whole vectors.
template <class E>
PVT_INLINE void add_row(const E* row, int width, float* sums) {
  for (int c = 0; c < width; c += kLanes) store(sums + c, load(sums + c) + load(row + c));
}

// total += some, which begins anew.
inline void move_sums(float* some, int width, float* total) {
  for (int c = 0; c < width; c += kLanes) {
    store(total + c, load(total + c) + load(some + c));
    store(some + c, Vec{});
  }
}

// sums = the sum of `count` rows, `ld` apart; some: room for as much.
template <class E>
void sum_rows(const E* rows, std::ptrdiff_t ld, std::int64_t count, int width, float* some, float* sums) {
  std::memset(some, 0, width * sizeof(float));
  std::memset(sums, 0, width * sizeof(float));
  for (std::int64_t r = 0; r < count; ++r) {
    add_row(rows + r * ld, width, some);
    if (r % kRowsOfSum == kRowsOfSum - 1 || r + 1 == count) move_sums(some, width, sums);
  }
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
  const auto inside = [](int count) PVT_LAMBDA { return count == kLanes ? splat(1) : first_lanes(count); };
  Vec sums{};
  columns([&](int, int count, Vec v) PVT_LAMBDA { sums += (v - first) * inside(count); });
  const float mean = first + sum_of_lanes(sums) * share;
  sums = Vec{};
  columns([&](int, int count, Vec v) PVT_LAMBDA {
    const Vec d = (v - mean) * inside(count);
    sums += d * d;
  });
  const float variance = sum_of_lanes(sums) * share, scale = 1.0f / std::sqrt(variance + norm.eps) + variance * 0.0f;
  Vec plain{}, along{};
  columns([&](int c, int count, Vec v) PVT_LAMBDA {
    const Vec g = grad(c), d = (v - mean) * scale * inside(count), weighted = g * load(norm.weight.data() + c);
    store(grad_weight + c, load(grad_weight + c) + g * d);
    store(grad_bias + c, load(grad_bias + c) + g);
    plain += weighted;
    along += weighted * d;
  });
  const float plain_mean = sum_of_lanes(plain) * share, along_mean = sum_of_lanes(along) * share;
  columns([&](int c, int count, Vec v) PVT_LAMBDA {
    const Vec d = (v - mean) * scale;
    take(c, count, (grad(c) * load(norm.weight.data() + c) - plain_mean - d * along_mean) * scale);
  });
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

// LayerNorm's gradient by rows, and the sums over all rows of three gradients: of its weight, of its bias, and of a
// bias beside it, whose gradient is rows of its own.
template <class E>
class NormGradients {
 public:
  NormGradients(std::int64_t rows, std::size_t width)
      : rows_(rows), tiles_(std::clamp<std::int64_t>(rows / 64, 1, 4 * gradient_items())), width_(width) {}

  std::size_t sums_size() const { return tiles_ * 6 * width_; }

  // x(row), grad(row): the norm's input, and its output's gradient, which is either padded to whole vectors or dense;
  // take(row, column, count, gradient) of the input. beside(row): rows of E, or null. Any of grads may be null.
  template <class X, class Grad, class Take, class Beside>
  void run(const PackedNorm& norm, const X& x, const Grad& grad, const Take& take, const Beside& beside, float* all,
           std::array<float*, 3> grads) const {
    parallel_for(tiles_, [&](std::int64_t tile) {
      float *total = all + tile * 6 * width_, *some = total + 3 * width_;
      std::memset(total, 0, 6 * width_ * sizeof(float));
      float *weight = some, *bias = weight + width_, *last = bias + width_;
      const std::int64_t begin = tile * rows_ / tiles_, end = (tile + 1) * rows_ / tiles_;
      for (std::int64_t row = begin; row < end; ++row) {
        const auto* gradient = grad(row);
        norm_gradient(
            norm, x(row),
            [&](int c) PVT_LAMBDA { return load_columns(gradient + c, std::min(kLanes, norm.channels - c)); }, weight,
            bias, [&](int c, int count, Vec value) PVT_LAMBDA { take(row, c, count, value); });
        if (const E* from = beside(row)) add_row(from, int(width_), last);
        if ((row - begin) % kRowsOfSum == kRowsOfSum - 1 || row + 1 == end) move_sums(some, int(3 * width_), total);
      }
    });
    fold_parts(all, tiles_, 6 * width_, 3 * width_);
    for (int i = 0; i < 3; ++i)
      if (grads[i]) std::memcpy(grads[i], all + i * width_, norm.channels * sizeof(float));
  }

 private:
  std::int64_t rows_, tiles_;
  std::size_t width_;
};

// The end of a residual op's backward: what comes through its norm, and the residual's gradient.
template <class T>
auto add_residual(const T* grad_out, T* grad_x, int channels) {
  return [=](std::int64_t row, int c, int count, Vec value) PVT_LAMBDA {
    const std::ptrdiff_t at = row * channels + c;
    if (grad_x) store_columns(grad_x + at, load_columns(grad_out + at, count) + value, count);
  };
}
