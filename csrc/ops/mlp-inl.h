// x + scale * fc2(gelu(dwconv3x3(h))), h = [relu] fc1(LayerNorm(x)).
// Compiled once per ISA: included by isa/kernels-inl.h, which says how.
//
// The hidden map is 4-8 times as wide as x; it never leaves the second-level caches. For each panel of hidden channels
// fc1 gives some image rows of the panel (they stay near the first-level cache), depthwise convolution and GELU turn
// them into activated rows; fc2 takes those when all panels are done. Two ways to share that out:
//
// * by groups of image rows, where the weights stay in each core's cache. A thread walks down an image, and carries two
//   hidden rows per panel from group to group, so that none is computed twice.
// * by panels, where weights are large, maps small, and images fewer than threads: every weight is read once. What one
//   thread writes another reads then, which is slow between cores that share no cache.

template <class T, class E>
class MlpOp final : public ResidualOp {
 public:
  explicit MlpOp(const MlpWeights& w)
      : channels_(w.channels),
        hidden_(w.hidden),
        relu_(w.relu),
        norm_(w.norm, w.channels),
        fc1_(pack_linear<E, T>(w.fc1, w.hidden, w.channels)),
        fc2_(pack_linear<E, T>(w.fc2, w.channels, w.hidden)),
        taps_(pack_taps<T>(w.dwconv, w.hidden, fc1_.panels())) {
    const T* taps = static_cast<const T*>(w.dwconv.weight);
    finite_taps_ =
        std::all_of(taps, taps + std::ptrdiff_t(hidden_) * 9, [](T tap) { return __builtin_isfinite(to_float(tap)); });
  }

  int channels() const override { return channels_; }
  int min_side() const override { return 1; }

  void run(const void* x, Map map, const void* residual_scale, void* out) const override {
    const Call call{static_cast<const T*>(x), static_cast<T*>(out), static_cast<const T*>(residual_scale), map};
    const std::int64_t threads = max_threads();
    const std::size_t activated = activated_size(map.tokens()) * sizeof(E);
    const bool few_rows = map.batch * map.height < 2 * kItemsPerThread * threads;
    const bool fits = activated * map.batch <= threads * l2_bytes() * 5 / 4;
    if ((large_weights() || few_rows) && map.batch < threads && fits)
      run_panels(call);
    else
      run_groups(call);
  }

 private:
  static constexpr bool kPrecise = std::is_same_v<T, float> && std::is_same_v<E, float>;
  static constexpr int kStreamedTokens = 192;

  // Hidden rows of one panel have a zero column at either end: the convolution's padding. The matrix unit stores whole
  // tiles at a time: there, normalised rows have the same gaps, so that fc1's rows are the hidden rows' as they stand.
  static constexpr int kGap = Target::kMatrixUnit ? 1 : 0;

  struct Call {
    const T* x;
    T* out;
    const T* residual_scale;
    Map map;
    const T* image(std::int64_t index, std::int64_t row, int channels) const {
      return x + (index * map.tokens() + row * map.width) * channels;
    }
    float scale(std::int64_t index) const { return residual_scale ? to_float(residual_scale[index]) : 1.0f; }
  };

  bool large_weights() const { return (fc1_.data.size() + fc2_.data.size()) * sizeof(E) > l2_bytes() / 2; }
  std::size_t normed_width() const { return row_width(channels_); }
  static int normed_tokens(int width) { return width + 2 * kGap; }  // of one image row
  // The activated map is [panel][token][kPanel].
  std::size_t activated_size(std::size_t tokens) const { return row_room(tokens) * fc1_.panels() * kPanel; }
  static Rows<E> activated_rows(const E* activated, std::int64_t first, std::size_t tokens) {
    return {activated + first * kPanel, kPanel, kPanel, std::ptrdiff_t(row_room(tokens) * kPanel)};
  }

  void run_groups(const Call& call) const {
    const Map& map = call.map;
    // a group's activated and normed rows take a quarter of the cache; two rows at least, as two are carried; enough of
    // them for large weights to be worth streaming past
    const std::size_t row_bytes = map.width * (row_width(hidden_) + normed_width()) * sizeof(E);
    const std::int64_t enough = large_weights() ? (kStreamedTokens + map.width - 1) / map.width : 2;
    const std::int64_t max_rows = std::max<std::int64_t>(enough, l2_bytes() / 4 / row_bytes);
    Split split = split_rows(map.batch, map.height, 2, max_rows);
    split.tiles = std::clamp<std::int64_t>(split.tiles, 1, std::max(1, map.height / 2));
    parallel_workers(map.batch * split.tiles, [&](Worker& worker) {
      Groups groups(*this, call, int((map.height + split.tiles - 1) / split.tiles));
      std::int64_t before = -2;
      for (std::int64_t item; (item = worker.next()) >= 0; before = item)
        groups.run(split.tile(item), item == before + 1 && item % split.tiles != 0);
    });
  }

  // One thread's buffers for groups of at most `most` rows.
  class Groups {
   public:
    Groups(const MlpOp& op, const Call& call, int max_rows)
        : op_(op), call_(call), width_(call.map.width), row_(padded_row(call.map.width)) {
      const std::size_t new_tokens = std::size_t(max_rows + 2) * normed_tokens(width_);
      const int panels = op.fc1_.panels();
      const std::size_t hidden_size = (max_rows + 2 + 2 * (panels + 1)) * row_;
      tokens_ = std::size_t(max_rows) * width_;
      std::tie(normed_, activated_, hidden_, places_, rows_, pairs_) =
          thread_scratch().take(array<E>(row_room(new_tokens) * op.normed_width()),
                                array<E>(op.activated_size(tokens_)), array<float>(hidden_size), array<int>(new_tokens),
                                array<const float*>(max_rows + 2), array<float*>(panels + 1));
      for (int i = 0; i <= panels; ++i) pairs_[i] = hidden_ + (max_rows + 2 + 2 * i) * row_;
      std::memset(hidden_, 0, hidden_size * sizeof(float));
      hidden_places(width_, max_rows + 2, places_);
    }

    // Rows [begin, end) of an image; `carried` where this thread has just done the rows above them.
    void run(Split::Tile tile, bool carried) {
      const MatrixUnit unit;
      const int from = tile.begin, height = tile.rows(), map_height = call_.map.height;
      // Hidden row j of the group is row from - 1 + j of the image. The last two go where the next group finds them.
      const bool carries = tile.end < map_height;
      const int first = carried ? 2 : from == 0 ? 1 : 0, kept = carries ? height : height + 1;
      const int last = carries ? height + 2 : height + 1;
      const T* x = call_.image(tile.image, from - 1 + first, op_.channels_);
      for (int j = first; j < last; ++j) op_.norm_row(x, j - first, width_, normed_);
      const std::size_t row_bytes = row_ * sizeof(float);
      if (from == 0) std::memset(hidden_, 0, row_bytes);
      if (!carries) std::memset(hidden_ + (height + 1) * row_, 0, row_bytes);
      for (int p = 0; p < op_.fc1_.panels(); ++p) {
        // the last two rows go to the spare pair, which changes places with the panel's when that has been used
        float *&pair = pairs_[p], *&spare = pairs_[op_.fc1_.panels()];
        for (int j = 0; j < height + 2; ++j) rows_[j] = hidden_ + j * row_;
        for (int j = 0; carried && j < 2; ++j) rows_[j] = pair + j * row_;
        for (int j = kept; carries && j < height + 2; ++j) rows_[j] = spare + (j - kept) * row_;
        op_.fc1_panel(p, normed_, 0, kept - first, width_, hidden_ + first * row_, places_);
        if (carries) {
          const int start = std::max(first, kept);
          op_.fc1_panel(p, normed_, start - first, last - start, width_, spare + (start - kept) * row_, places_);
        }
        op_.convolve(p, rows_, tile, call_.map, activated_ + p * row_room(tokens_) * kPanel);
        if (carries) std::swap(pair, spare);
      }
      const std::ptrdiff_t at = call_.image(tile.image, from, op_.channels_) - call_.x;
      gemm(activated_rows(activated_, 0, tokens_), height * width_, op_.fc2_, op_.output(call_, tile.image, at));
    }

   private:
    const MlpOp& op_;
    const Call& call_;
    const int width_;
    const std::size_t row_;  // floats of a hidden row
    std::size_t tokens_;     // that there is room for
    E *normed_, *activated_;
    float *hidden_, **pairs_;  // two rows of each panel that the next group begins with, and a spare pair
    int* places_;
    const float** rows_;
  };

  // Panels of hidden channels first, then of the output.
  void run_panels(const Call& call) const {
    const Map& map = call.map;
    const int width = map.width, tokens = int(map.tokens());
    const std::int64_t all = map.batch * tokens;
    E *normed, *activated;
    int* places;
    std::tie(normed, activated, places) =
        shared_scratch().take(array<E>(row_room(map.batch * map.height * normed_tokens(width)) * normed_width()),
                              array<E>(activated_size(all)), array<int>(map.height * normed_tokens(width)));
    hidden_places(width, map.height, places);
    const Split rows = split_light(1, map.batch * map.height, width * channels_);
    parallel_for(rows.tiles, [&](std::int64_t item) {
      const auto tile = rows.tile(item);
      for (int row = tile.begin; row < tile.end; ++row) norm_row(call.x, row, width, normed);
    });
    // bands of rows compute two hidden rows more: only where panels are too few for the threads
    const Split bands = split_rows(map.batch * fc1_.panels(), map.height, 4, map.height);
    parallel_for(fc1_.panels() * map.batch * bands.tiles, [&](std::int64_t item) {
      const auto band = bands.tile(item);
      const std::int64_t p = band.image / map.batch, index = band.image % map.batch;
      const E* to = activated_rows(activated, index * tokens, all).at(0, int(p) * kPanel);
      hidden_band(int(p), map, band, normed, int(index) * map.height, places, const_cast<E*>(to));
    });
    for_panels(map.batch, fc2_, tokens, 1, [&](int p, std::int64_t index, Split::Tile cut, int) {
      const std::int64_t row = index * tokens + cut.begin;
      gemm_panel(activated_rows(activated, row, all), cut.rows(), fc2_.panel(p), p * kPanel,
                 output(call, index, row * channels_));
    });
  }

  // Rows [begin, end) of one panel of an image's activated map; its normalised map starts at row `top` of `normed`.
  void hidden_band(int p, const Map& map, Split::Tile band, const E* normed, int top, const int* places,
                   E* activated) const {
    const MatrixUnit unit;
    const int width = map.width, first = std::max(band.begin - 1, 0), last = std::min(band.end + 1, map.height);
    const std::size_t row = padded_row(width);
    const auto [hidden, rows] =
        thread_scratch().take(array<float>((band.rows() + 2) * row), array<const float*>(band.rows() + 2));
    std::memset(hidden, 0, (band.rows() + 2) * row * sizeof(float));
    for (int j = 0; j < band.rows() + 2; ++j) rows[j] = hidden + j * row;
    fc1_panel(p, normed, top + first, last - first, width, hidden + (first - (band.begin - 1)) * row, places);
    convolve(p, rows, band, map, activated + std::ptrdiff_t(band.begin) * width * kPanel);
  }

  // LayerNorm of row `row` of the maps at x.
  void norm_row(const T* x, std::int64_t row, int width, E* normed) const {
    const T* from = x + row * width * channels_;
    E* to = normed + (row * normed_tokens(width) + kGap) * std::ptrdiff_t(normed_width());
    NormRows<T, E> tokens(norm_, int(normed_width()));
    for (int c = 0; c < width; ++c) tokens.add(from + std::ptrdiff_t(c) * channels_, to + c * normed_width());
  }

  // Places of the tokens of `rows` rows in a panel's hidden rows.
  static void hidden_places(int width, int rows, int* places) {
    for (int y = 0; y < rows; ++y)
      for (int c = 0; c < width; ++c) *places++ = y * (width + 2) + c + 1;
  }

  // One panel of fc1 for rows [first, first + rows) of the normalised map.
  void fc1_panel(int p, const E* normed, int first, int rows, int width, float* hidden, const int* places) const {
    const Rows<E> a = rows_of(normed, std::int64_t{first} * normed_tokens(width), normed_width());
    Epilogue<float> epilogue = store_rows(hidden, kPanel, fc1_.bias.data() + p * kPanel);
    epilogue.places = kGap ? nullptr : places;
    epilogue.relu = relu_;
    epilogue.columns = std::min(kPanel, hidden_ - p * kPanel);  // the others stay zero, whatever the rows are
    gemm_panel(a, rows * normed_tokens(width), fc1_.panel(p), 0, epilogue);
    for (int y = 0; kGap && y < rows; ++y)  // what came of the gaps
      for (int c = 0; c < kPanel; ++c)
        hidden[y * padded_row(width) + c] = hidden[(y + 1) * padded_row(width) - kPanel + c] = 0;
  }

  // The epilogue of fc2 for the rows that start at element `at`.
  Epilogue<T> output(const Call& call, std::int64_t image, std::ptrdiff_t at) const {
    return add_rows(call.out + at, call.x + at, call.scale(image), channels_, fc2_.bias.data());
  }

  // gelu(dwconv) of a band of one panel: rows[y] is the row above its row y.
  void convolve(int p, const float* const* rows, Split::Tile band, const Map& map, E* out) const {
    const int count = band.rows(), width = map.width;
    const float* panel = taps_.data() + std::size_t(p) * kTaps * kPanel;
    if (!finite_taps_) return convolve_inside(panel, rows, band, map, out);
    for (int part = 0; part < fc1_.layout.width(p); part += kLanes) {
      Vec taps[9];
      for (int i = 0; i < 9; ++i) taps[i] = load(panel + i * kPanel + part);
      const Vec bias = load(panel + 9 * kPanel + part);
      for (int y = 0; y < count; ++y) {
        const float* above[3] = {rows[y] + part, rows[y + 1] + part, rows[y + 2] + part};
        E* to = out + std::ptrdiff_t(y) * width * kPanel + part;
        convolve_row(above, width, taps, bias,
                     [&](int c, Vec sum) PVT_LAMBDA { store(to + c * kPanel, gelu<kPrecise>(sum)); });
      }
    }
  }

  // The same without the taps that lie outside the map: torch leaves them out, and zeros times infinity were NaN.
  __attribute__((noinline)) void convolve_inside(const float* panel, const float* const* rows, Split::Tile band,
                                                 const Map& map, E* out) const {
    const auto inside = [](int at, int size) { return at >= 0 && at < size; };
    for (int y = 0; y < band.rows(); ++y)
      for (int c = 0; c < map.width; ++c, out += kPanel)
        for (int part = 0; part < kPanel; part += kLanes) {
          const float* above[3] = {rows[y] + part, rows[y + 1] + part, rows[y + 2] + part};
          Vec taps[9], sum[1];
          for (int i = 0; i < 9; ++i) {
            const bool used = inside(band.begin + y + i / 3 - 1, map.height) && inside(c + i % 3 - 1, map.width);
            taps[i] = used ? load(panel + i * kPanel + part) : Vec{};
          }
          convolve_columns(above, c, taps, load(panel + 9 * kPanel + part), sum);
          store(out + part, gelu<kPrecise>(sum[0]));
        }
  }

  int channels_, hidden_;
  bool relu_, finite_taps_ = true;
  PackedNorm norm_;
  PackedMatrix<E> fc1_, fc2_;
  Buffer<float> taps_;  // [panel][nine taps, bias][kPanel]
};
