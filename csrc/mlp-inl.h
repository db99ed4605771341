// x + scale * fc2(gelu(dwconv3x3(h))), h = [relu] fc1(LayerNorm(x)).
//
// The hidden map is 4-8 times as wide as x; it never leaves the second-level cache. A band of image rows is walked in
// groups of rows: for each panel of hidden channels, fc1 gives the group's hidden rows (one panel wide: they stay in
// the first-level cache), depthwise convolution and GELU turn them into the group's activated rows; when all panels are
// done, fc2 takes those. Two hidden rows per panel are carried from group to group, so none is computed twice.

template <class T, class E>
class MlpOp final : public ResidualOp {
 public:
  explicit MlpOp(const MlpWeights& w)
      : channels_(w.channels),
        hidden_(w.hidden),
        relu_(w.relu),
        norm_(w.norm, w.channels, static_cast<const T*>(nullptr)),
        fc1_(pack_linear<E, T>(w.fc1, w.hidden, w.channels)),
        fc2_(pack_linear<E, T>(w.fc2, w.channels, w.hidden)),
        taps_(std::size_t(fc1_.panels()) * kTaps * kPanel) {
    const T* taps = static_cast<const T*>(w.dwconv.weight);
    const T* bias = static_cast<const T*>(w.dwconv.bias);
    for (int c = 0; c < hidden_; ++c) {
      float* panel = taps_.data() + std::size_t(c / kPanel) * kTaps * kPanel + c % kPanel;
      for (int i = 0; i < 9; ++i) panel[i * kPanel] = to_float(taps[c * 9 + i]);
      panel[9 * kPanel] = bias ? to_float(bias[c]) : 0.0f;
    }
  }

  void run(const void* x, Map map, const void* residual_scale, void* out) const override {
    const std::int64_t size = map.tokens() * channels_;
    auto image = [&](std::int64_t index) {
      const float scale = residual_scale ? to_float(static_cast<const T*>(residual_scale)[index]) : 1.0f;
      return Image{static_cast<const T*>(x) + index * size, static_cast<T*>(out) + index * size, map.height, map.width,
                   scale};
    };
    // A whole image per thread while there are enough. The images left over are cut into bands, each of which computes
    // two hidden rows more; where that would cost more than a seventh of fc1, threads share an image by panels, unless
    // its activated map would leave their caches.
    const std::int64_t threads = max_threads(), whole = map.batch / threads * threads;
    parallel_for(whole, [&](std::int64_t i) { run_band(image(i), 0, map.height); });
    const bool fits = map.tokens() * activated_width() * sizeof(E) <= threads * l2_bytes();
    if (map.height < kLeastBand * threads && fits) {
      for (std::int64_t i = whole; i < map.batch; ++i) run_shared(image(i));
    } else {
      const int rows = std::max(kLeastBand, int((map.height + threads - 1) / threads));
      const std::int64_t bands = (map.height + rows - 1) / rows;
      parallel_for((map.batch - whole) * bands, [&](std::int64_t item) {
        const int begin = int(item % bands) * rows;
        run_band(image(whole + item / bands), begin, std::min(begin + rows, map.height));
      });
    }
  }

 private:
  static constexpr int kTaps = 10;       // nine and the bias
  static constexpr int kLeastBand = 14;  // rows

  struct Image {
    const T* x;
    T* out;
    int height, width;
    float scale;
  };

  std::size_t normed_width() const { return row_width(channels_); }
  std::size_t activated_width() const { return row_width(hidden_); }
  // Hidden rows of one panel have a zero column at either end: the convolution's padding.
  static std::size_t hidden_row(int width) { return std::size_t(width + 2) * kPanel; }

  // Rows per group such that the group's activated and normed rows take about half of the second-level cache; at least
  // two, or the carried rows would outweigh the new ones.
  int group_rows(int width, int band) const {
    const std::size_t row = width * (activated_width() + normed_width()) * sizeof(E);
    const int most = std::max(2, int(l2_bytes() / 2 / row));
    const int groups = (band + most - 1) / most;
    return (band + groups - 1) / groups;
  }

  void run_band(const Image& image, int begin, int end) const {
    const MatrixUnit unit;
    const int width = image.width, most = group_rows(width, end - begin), panels = fc1_.panels();
    const std::size_t row = hidden_row(width);
    const std::size_t new_tokens = std::size_t(most + 2) * width, tokens = std::size_t(most) * width;
    const std::size_t carry_size = most < end - begin ? panels * 2 * row : 0;
    Scratch& scratch = thread_scratch();
    scratch.reset(Scratch::bytes_for<E>(row_room(new_tokens) * normed_width()) +
                  Scratch::bytes_for<E>(row_room(tokens) * activated_width()) +
                  Scratch::bytes_for<float>((most + 2) * row) + Scratch::bytes_for<float>(carry_size) +
                  Scratch::bytes_for<int>(new_tokens));
    E* normed = scratch.take<E>(row_room(new_tokens) * normed_width());
    E* activated = scratch.take<E>(row_room(tokens) * activated_width());
    float* hidden = scratch.take<float>((most + 2) * row);
    float* carry = scratch.take<float>(carry_size);
    int* offsets = scratch.take<int>(new_tokens);
    std::memset(hidden, 0, (most + 2) * row * sizeof(float));

    for (int from = begin; from < end; from += most) {
      const int to = std::min(from + most, end);
      // hidden row j of the group is image row from - 1 + j; those up to `from` are carried from the group before
      const int first = from == begin ? std::max(from - 1, 0) : from + 1, last = std::min(to + 1, image.height);
      const int count = norm_rows(image, first, last, normed);
      hidden_offsets(width, first - (from - 1), count, offsets);
      for (int p = 0; p < panels; ++p) {
        float* carried = carry + p * 2 * row;
        if (from == 0) std::memset(hidden, 0, row * sizeof(float));
        if (from > begin) std::memcpy(hidden, carried, 2 * row * sizeof(float));
        if (to == image.height) std::memset(hidden + (to + 1 - from) * row, 0, row * sizeof(float));
        fc1_panel(p, normed, count, hidden, offsets);
        if (to < end) std::memcpy(carried, hidden + (to - from) * row, 2 * row * sizeof(float));
        convolve(p, hidden, to - from, width, activated + p * kPanel);
      }
      const std::ptrdiff_t at = std::ptrdiff_t(from) * width * channels_;
      gemm(activated, activated_width(), (to - from) * width, fc2_, output(image, at));
    }
  }

  // All threads on one image: panels of hidden channels first, then tiles of the output.
  void run_shared(const Image& image) const {
    const int width = image.width, height = image.height, tokens = height * width;
    Scratch& shared = shared_scratch();
    shared.reset(Scratch::bytes_for<E>(row_room(tokens) * normed_width()) +
                 Scratch::bytes_for<E>(row_room(tokens) * activated_width()) + Scratch::bytes_for<int>(tokens));
    E* normed = shared.take<E>(row_room(tokens) * normed_width());
    E* activated = shared.take<E>(row_room(tokens) * activated_width());
    int* offsets = shared.take<int>(tokens);
    hidden_offsets(width, 1, tokens, offsets);
    parallel_for(height, [&](std::int64_t y) { norm_rows(image, y, y + 1, normed + y * width * normed_width()); });
    parallel_for(fc1_.panels(), [&](std::int64_t p) {
      const MatrixUnit unit;
      const std::size_t size = (height + 2) * hidden_row(width);
      thread_scratch().reset(Scratch::bytes_for<float>(size));
      float* hidden = thread_scratch().template take<float>(size);
      std::memset(hidden, 0, size * sizeof(float));
      fc1_panel(int(p), normed, tokens, hidden, offsets);
      convolve(int(p), hidden, height, width, activated + p * kPanel);
    });
    // A panel of fc2 for all rows, so that weights are read once; rows are cut only where threads outnumber panels.
    const int cuts = (2 * max_threads() + fc2_.panels() - 1) / fc2_.panels();
    const int rows = int(round_up((tokens + cuts - 1) / cuts, 16));
    const int tiles = (tokens + rows - 1) / rows;
    parallel_for(tiles * fc2_.panels(), [&](std::int64_t item) {
      const MatrixUnit unit;
      const int row = int(item % tiles) * rows, p = int(item / tiles);
      gemm_panel(activated + row * activated_width(), activated_width(), std::min(rows, tokens - row), fc2_.panel(p),
                 fc2_.depth, p * kPanel, output(image, std::ptrdiff_t(row) * channels_));
    });
  }

  // LayerNorm of image rows [first, last) into `normed`; the number of tokens.
  int norm_rows(const Image& image, std::int64_t first, std::int64_t last, E* normed) const {
    const int count = int(last - first) * image.width;
    const T* x = image.x + first * image.width * channels_;
    for (int t = 0; t < count; ++t)
      layer_norm_row(x + std::ptrdiff_t(t) * channels_, norm_, normed + t * normed_width(), int(normed_width()));
    return count;
  }

  // Places of `count` tokens in a panel's hidden rows, from row `first` on.
  static void hidden_offsets(int width, int first, int count, int* offsets) {
    for (int t = 0; t < count; ++t) offsets[t] = ((first + t / width) * (width + 2) + t % width + 1) * kPanel;
  }

  void fc1_panel(int p, const E* normed, int count, float* hidden, const int* offsets) const {
    Epilogue<float> epilogue{};
    epilogue.out = hidden;
    epilogue.offsets = offsets;
    epilogue.columns = kPanel;
    epilogue.bias = fc1_.bias.data() + p * kPanel;
    epilogue.relu = relu_;
    gemm_panel(normed, normed_width(), count, fc1_.panel(p), fc1_.depth, 0, epilogue);
  }

  Epilogue<T> output(const Image& image, std::ptrdiff_t at) const {
    Epilogue<T> epilogue{};
    epilogue.out = image.out + at;
    epilogue.ld = channels_;
    epilogue.columns = channels_;
    epilogue.bias = fc2_.bias.data();
    epilogue.residual = image.x + at;
    epilogue.residual_scale = image.scale;
    return epilogue;
  }

  // gelu(dwconv) of `rows` rows of one panel: `hidden` has one row more above and below, one column more either side.
  void convolve(int p, const float* hidden, int rows, int width, E* out) const {
    const float* panel = taps_.data() + std::size_t(p) * kTaps * kPanel;
    for (int half = 0; half < kPanel; half += kLanes) {
      Vec taps[kTaps];
      for (int i = 0; i < kTaps; ++i) taps[i] = load(panel + i * kPanel + half);
      for (int y = 0; y < rows; ++y) {
        const float* above = hidden + y * hidden_row(width) + half;
        E* to = out + std::size_t(y) * width * activated_width() + half;
        int c = 0;
        for (; c + 4 <= width; c += 4) convolve_columns<4>(above + c * kPanel, width, taps, to + c * activated_width());
        for (; c < width; ++c) convolve_columns<1>(above + c * kPanel, width, taps, to + c * activated_width());
      }
    }
  }

  // kColumns outputs of one row: each loaded value serves up to three of them.
  template <int kColumns>
  PVT_INLINE void convolve_columns(const float* above, int width, const Vec (&taps)[kTaps], E* out) const {
    Vec acc[kColumns];
    for (int i = 0; i < kColumns; ++i) acc[i] = taps[9];
#pragma GCC unroll 3
    for (int dy = 0; dy < 3; ++dy) {
      const float* row = above + dy * hidden_row(width);
#pragma GCC unroll 6
      for (int j = 0; j < kColumns + 2; ++j) {
        const Vec value = load(row + j * kPanel);
#pragma GCC unroll 3
        for (int dx = 0; dx < 3; ++dx)
          if (j - dx >= 0 && j - dx < kColumns) acc[j - dx] += value * taps[dy * 3 + dx];
      }
    }
    for (int i = 0; i < kColumns; ++i) store(out + i * activated_width(), gelu<std::is_same_v<T, float>>(acc[i]));
  }

  int channels_, hidden_;
  bool relu_;
  PackedNorm norm_;
  PackedMatrix<E> fc1_, fc2_;
  Buffer<float> taps_;  // [panel][nine taps, bias][kPanel]
};
