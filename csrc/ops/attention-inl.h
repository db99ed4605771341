// x + scale * proj(softmax(q k^T) v), y = LayerNorm(x), q = y Wq, k and v from the reduced map of y.
// Compiled once per ISA: included by isa/kernels-inl.h, which says how.
//
// y is computed once, its tokens in the order of the reducing convolution's patches (spatial_reduction-inl.h); queries
// are the same memory as rows of tokens. Keys and values are packed for the products to come (keys_values-inl.h).
// Queries then go all the way to the output in tiles, so that q, scores, probabilities and their product with v stay in
// cache; where weights are large and the map small, each step is shared out by panels instead, so that every weight is
// read once.

template <class T, class E>
class AttentionOp final : public ResidualOp {
 public:
  explicit AttentionOp(const AttentionWeights& w)
      : heads_(w.channels, w.heads),
        scale_(w.scale * 1.4426950408889634f),
        norm_(w.norm, w.channels),
        reduction_(w),
        q_(heads_.template pack_inputs<E, T>(w.q, 1)),
        kv_(heads_.template pack_inputs<E, T>(w.kv, 2)),
        proj_(heads_.template pack_projection<E, T>(w.proj)) {}

  int channels() const override { return heads_.channels; }
  int min_side() const override { return reduction_.min_side(); }

  void run(const void* x, Map map, const void* residual_scale, void* out) const override {
    const KeysValues<E> kv(heads_, reduction_.keys(map));
    // images at a time, so that a large batch takes bounded memory
    const std::size_t packed_keys = heads_.count * (kv.k.size() + kv.v.size());
    const std::size_t image_bytes = (map.tokens() * normed_width() + packed_keys) * sizeof(E);
    const std::int64_t max_images = std::max<std::int64_t>(1, kWaveBytes / image_bytes);
    for (std::int64_t first = 0; first < map.batch; first += max_images) {
      const std::ptrdiff_t at = first * map.tokens() * channels();
      const T* scale = static_cast<const T*>(residual_scale);
      Wave wave{{std::min(max_images, map.batch - first), map.height, map.width},
                static_cast<const T*>(x) + at,
                static_cast<T*>(out) + at,
                scale ? scale + first : nullptr,
                kv};
      take_buffers(wave);
      norm_tokens(wave);
      make_keys(wave);
      wave.by_panels ? attend_by_panels(wave) : attend_by_tiles(wave);
    }
  }

 private:
  static constexpr std::size_t kWaveBytes = std::size_t{8} << 20;

  // Some images on their way, and the memory that threads share for them.
  struct Wave {
    Map map;
    const T* x;
    T* out;
    const T* residual_scale;
    KeysValues<E> kv;
    bool by_panels = false;
    E* normed = nullptr;    // (images, tokens, normed_width), tokens in the order of patches
    int* places = nullptr;  // (tokens): which of an image's tokens lies there in `normed`
    E* reduced = nullptr;   // (images, keys, normed_width), where the map is reduced
    float* sums = nullptr;  // of its convolution
    E* queries = nullptr;   // (images, tokens, inner), by panels only
    E* values = nullptr;    // the same

    float scale(std::int64_t image) const { return residual_scale ? to_float(residual_scale[image]) : 1.0f; }
  };

  int inner() const { return heads_.inner(); }
  std::size_t normed_width() const { return row_width(heads_.channels); }

  void take_buffers(Wave& wave) const {
    KeysValues<E>& kv = wave.kv;
    const std::int64_t images = wave.map.batch;
    const std::size_t rows = images * wave.map.tokens(), keys = images * kv.keys, heads = images * heads_.count;
    const std::size_t weights = 2 * std::size_t(channels()) * inner() * sizeof(E);
    wave.by_panels = images < max_threads() && weights > l2_bytes() / 4 &&
                     3 * rows * inner() * sizeof(E) <= max_threads() * l2_bytes() / 4;
    // a tile of the matrix unit reaches past the last row
    const std::size_t normed_size = rows * normed_width() + row_room(1) * reduction_.patch_width();
    const std::size_t inner_size = wave.by_panels ? row_room(rows) * inner() : 0;
    const std::size_t zeros_size = std::max({kv.score_width(), std::size_t(heads_.width), normed_width()});
    std::tie(wave.normed, wave.places, wave.reduced, wave.sums, kv.all_k, kv.all_v, wave.queries, wave.values,
             kv.zeros) =
        shared_scratch().take(array<E>(normed_size), array<int>(wave.map.tokens()),
                              array<E>(reduction_.reduced_size(keys)), array<float>(reduction_.sums_size(keys)),
                              array<E>(heads * kv.k.size()), array<E>(heads * kv.v.size()), array<E>(inner_size),
                              array<E>(inner_size), array<float>(zeros_size));
    std::memset(kv.zeros, 0, zeros_size * sizeof(float));
  }

  // LayerNorm of all tokens, into the order of patches.
  void norm_tokens(const Wave& wave) const {
    const int height = wave.map.height, width = wave.map.width;
    const PatchOrder order(wave.map, reduction_.ratio());
    const Split split = split_light(wave.map.batch, height, width * channels());
    parallel_for(wave.map.batch * split.tiles, [&](std::int64_t item) {
      const auto tile = split.tile(item);
      const T* from = wave.x + (tile.image * height + tile.begin) * width * heads_.channels;
      E* normed = wave.normed + tile.image * wave.map.tokens() * normed_width();
      NormRows<T, E> rows(norm_, int(normed_width()));
      for (int y = tile.begin; y < tile.end; ++y)
        for (int x = 0; x < width; ++x, from += heads_.channels) {
          const int place = order.place(y, x);
          rows.add(from, normed + place * normed_width());
          if (tile.image == 0) wave.places[place] = y * width + x;
        }
    });
  }

  // Keys and values of all images, packed.
  void make_keys(const Wave& wave) const {
    if (reduction_.reduces()) reduction_.run(wave.map, wave.normed, wave.kv.zeros, wave.sums, wave.reduced);
    const E* source = reduction_.reduces() ? wave.reduced : wave.normed;
    const int keys = wave.kv.keys;
    for_panels(wave.map.batch, kv_, keys, 1, [&](int p, std::int64_t image, Split::Tile cut, int) {
      E* rows = std::get<0>(thread_scratch().take(array<E>(cut.rows() * kPanel)));
      const int width = kv_.layout.width(p);
      gemm_panel(rows_of(source, image * keys + cut.begin, normed_width()), cut.rows(), kv_.panel(p), 0,
                 store_rows(rows, width, kv_.bias.data() + p * kPanel));
      wave.kv.pack_columns(image, p * kPanel, width, rows, cut);
    });
  }

  // Tiles of queries, from q to the output.
  void attend_by_tiles(const Wave& wave) const {
    const KeysValues<E>& kv = wave.kv;
    const std::size_t row_bytes = 2 * inner() * sizeof(E) + kv.score_width() * (sizeof(float) + sizeof(E));
    const std::int64_t max_rows = std::clamp<std::int64_t>(l2_bytes() / 4 / row_bytes, kMinRows, 96);
    const Split split = split_rows(wave.map.batch, wave.map.tokens(), kMinRows, max_rows, kRowStep);
    parallel_for(wave.map.batch * split.tiles, [&](std::int64_t item) {
      const MatrixUnit unit;
      const auto tile = split.tile(item);
      const std::size_t room = row_room(tile.rows()) * inner();
      const auto [queries, values, scores, probabilities] =
          thread_scratch().take(array<E>(room), array<E>(room), kv.scores(tile.rows()), kv.probabilities(tile.rows()));
      const std::int64_t row = tile.image * wave.map.tokens() + tile.begin;
      gemm(rows_of(wave.normed, row, normed_width()), tile.rows(), q_, to_queries(queries));
      for (int h = 0; h < heads_.count; ++h)
        kv.attend(tile.image, h, tile.rows(), queries, scores, probabilities, values);
      gemm(rows_of(values, 0, inner()), tile.rows(), proj_, to_out(wave, tile));
    });
  }

  // Panels of q, then tiles of each head, then panels of the projection.
  void attend_by_panels(const Wave& wave) const {
    const std::int64_t images = wave.map.batch;
    const int tokens = int(wave.map.tokens());
    for_panels(images, q_, tokens, 1, [&](int p, std::int64_t image, Split::Tile cut, int) {
      const std::int64_t row = image * tokens + cut.begin;
      gemm_panel(rows_of(wave.normed, row, normed_width()), cut.rows(), q_.panel(p), p * kPanel,
                 to_queries(wave.queries + row * inner()));
    });
    const Split split = split_rows(images * heads_.count, tokens, kMinRows, 96, kRowStep);
    parallel_for(images * heads_.count * split.tiles, [&](std::int64_t item) {
      const MatrixUnit unit;
      const auto tile = split.tile(item);
      const std::int64_t image = tile.image / heads_.count, at = (image * tokens + tile.begin) * inner();
      const auto [scores, probabilities] =
          thread_scratch().take(wave.kv.scores(tile.rows()), wave.kv.probabilities(tile.rows()));
      wave.kv.attend(image, int(tile.image % heads_.count), tile.rows(), wave.queries + at, scores, probabilities,
                     wave.values + at);
    });
    for_panels(images, proj_, tokens, 1, [&](int p, std::int64_t image, Split::Tile cut, int) {
      cut.image = image;
      gemm_panel(rows_of(wave.values, image * tokens + cut.begin, inner()), cut.rows(), proj_.panel(p), p * kPanel,
                 to_out(wave, cut));
    });
  }

  Epilogue<E> to_queries(E* queries) const {
    Epilogue<E> epilogue = store_rows(queries, inner(), q_.bias.data());
    epilogue.multiply = scale_;
    return epilogue;
  }
  Epilogue<T> to_out(const Wave& wave, const Split::Tile& tile) const {
    const std::ptrdiff_t at = tile.image * wave.map.tokens() * heads_.channels;
    Epilogue<T> epilogue =
        add_rows(wave.out + at, wave.x + at, wave.scale(tile.image), heads_.channels, proj_.bias.data());
    epilogue.places = wave.places + tile.begin;
    return epilogue;
  }

  Heads heads_;
  float scale_;  // of the scores, times log2(e): the softmax works in powers of two
  PackedNorm norm_;
  SpatialReduction<T, E> reduction_;
  PackedMatrix<E> q_, kv_, proj_;
};
