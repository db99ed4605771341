// x + scale * proj(softmax(q k^T) v), y = LayerNorm(x), q = y Wq, k and v from the reduced map of y.
// Compiled once per ISA: included by isa/kernels-inl.h, which says how.
//
// y is computed once, its tokens in the order of the reducing convolution's patches (spatial_reduction-inl.h); queries
// are the same memory as rows of tokens. Keys and values are packed for the products to come (keys_values-inl.h).
// Queries then go all the way to the output in tiles, so that q, scores, probabilities and their product with v stay in
// cache; where weights are large and the map small, each step is shared out by panels instead, so that every weight is
// read once.

// What queries, keys and values are made with: LayerNorm, the reduction, and their matrices.
template <class T, class E>
class AttentionInputs {
 public:
  explicit AttentionInputs(const AttentionWeights& w)
      : heads(w.channels, w.heads),
        scale(w.scale * 1.4426950408889634f),
        norm(w.norm, w.channels),
        reduction(w),
        q(heads.template pack_inputs<E, T>(w.q, 1)),
        kv(heads.template pack_inputs<E, T>(w.kv, 2)) {}

  std::size_t width() const { return row_width(heads.channels); }
  // Elements of the normalised tokens of `rows` rows: a tile of the matrix unit reaches past the last one.
  std::size_t normed_size(std::size_t rows) const { return rows * width() + row_room(1) * reduction.patch_width(); }

  // body(token of the batch, its place in the order of patches, row and column), by rows of images on all threads.
  template <class Body>
  void for_rows(const Map& map, const Body& body) const {
    const PatchOrder order(map, reduction.ratio());
    const Split split = split_light(map.batch, map.height, std::int64_t{map.width} * heads.channels);
    parallel_for(map.batch * split.tiles, [&](std::int64_t item) { body(order, split.tile(item)); });
  }

  // LayerNorm of all tokens, into the order of patches; places: which of an image's tokens lies where.
  void norm_tokens(const Map& map, const T* x, E* normed, int* places) const {
    for_rows(map, [&](const PatchOrder& order, const Split::Tile& tile) {
      const T* from = x + (tile.image * map.height + tile.begin) * map.width * heads.channels;
      E* to = normed + tile.image * map.tokens() * width();
      NormRows<T, E> rows(norm, int(width()));
      for (int y = tile.begin; y < tile.end; ++y)
        for (int column = 0; column < map.width; ++column, from += heads.channels) {
          const int place = order.place(y, column);
          rows.add(from, to + place * width());
          if (tile.image == 0) places[place] = y * map.width + column;
        }
    });
  }

  // Keys and values of all images, from the rows that they are made of, handed over in pieces:
  // take(image, column, width, rows, cut).
  template <class Take>
  void make_keys(const Map& map, const E* source, const Take& take) const {
    const int keys = reduction.keys(map);
    for_panels(map.batch, kv, keys, 1, [&](int p, std::int64_t image, Split::Tile cut, int) {
      E* rows = std::get<0>(thread_scratch().take(array<E>(cut.rows() * kPanel)));
      const int columns = kv.layout.width(p);
      gemm_panel(rows_of(source, image * keys + cut.begin, width()), cut.rows(), kv.panel(p), 0,
                 store_rows(rows, columns, kv.bias.data() + p * kPanel));
      take(image, p * kPanel, columns, rows, cut);
    });
  }

  Epilogue<E> to_queries(E* queries) const {
    Epilogue<E> epilogue = store_rows(queries, heads.inner(), q.bias.data());
    epilogue.multiply = scale;
    return epilogue;
  }

  Heads heads;
  float scale;  // of the scores, times log2(e): the softmax works in powers of two
  PackedNorm norm;
  SpatialReduction<T, E> reduction;
  PackedMatrix<E> q, kv;
};

template <class T, class E>
class AttentionOp final : public ResidualOp {
 public:
  explicit AttentionOp(const AttentionWeights& w)
      : inputs_(w), proj_(inputs_.heads.template pack_projection<E, T>(w.proj)) {}

  int channels() const override { return inputs_.heads.channels; }
  int min_side() const override { return inputs_.reduction.min_side(); }

  void run(const void* x, Map map, const void* residual_scale, void* out) const override {
    const KeysValues<E> kv(inputs_.heads, inputs_.reduction.keys(map));
    // images at a time, so that a large batch takes bounded memory
    const std::size_t packed_keys = inputs_.heads.count * (kv.k.size() + kv.v.size());
    const std::size_t image_bytes = (map.tokens() * inputs_.width() + packed_keys) * sizeof(E);
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
      inputs_.norm_tokens(wave.map, wave.x, wave.normed, wave.places);
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

  int inner() const { return inputs_.heads.inner(); }

  void take_buffers(Wave& wave) const {
    KeysValues<E>& kv = wave.kv;
    const std::int64_t images = wave.map.batch;
    const std::size_t rows = images * wave.map.tokens(), keys = images * kv.keys, heads = images * inputs_.heads.count;
    const std::size_t weights = 2 * std::size_t(channels()) * inner() * sizeof(E);
    wave.by_panels = images < max_threads() && weights > l2_bytes() / 4 &&
                     3 * rows * inner() * sizeof(E) <= max_threads() * l2_bytes() / 4;
    const std::size_t inner_size = wave.by_panels ? row_room(rows) * inner() : 0;
    const std::size_t zeros_size = std::max({kv.score_width(), std::size_t(inputs_.heads.width), inputs_.width()});
    std::tie(wave.normed, wave.places, wave.reduced, wave.sums, kv.all_k, kv.all_v, wave.queries, wave.values,
             kv.zeros) = shared_scratch().take(array<E>(inputs_.normed_size(rows)), array<int>(wave.map.tokens()),
                                               array<E>(inputs_.reduction.reduced_size(keys)),
                                               array<float>(inputs_.reduction.sums_size(keys)),
                                               array<E>(heads * kv.k.size()), array<E>(heads * kv.v.size()),
                                               array<E>(inner_size), array<E>(inner_size), array<float>(zeros_size));
    std::memset(kv.zeros, 0, zeros_size * sizeof(float));
  }

  // Keys and values of all images, packed.
  void make_keys(const Wave& wave) const {
    const SpatialReduction<T, E>& reduction = inputs_.reduction;
    if (reduction.reduces()) reduction.run(wave.map, wave.normed, wave.kv.zeros, wave.sums, wave.reduced, wave.reduced);
    const E* source = reduction.reduces() ? wave.reduced : wave.normed;
    inputs_.make_keys(wave.map, source,
                      [&](std::int64_t image, int column, int width, const E* rows, const Split::Tile& cut) {
                        wave.kv.pack_columns(image, column, width, rows, cut);
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
      gemm(rows_of(wave.normed, row, inputs_.width()), tile.rows(), inputs_.q, inputs_.to_queries(queries));
      for (int h = 0; h < inputs_.heads.count; ++h)
        kv.attend(tile.image, h, tile.rows(), queries, scores, probabilities, values);
      gemm(rows_of(values, 0, inner()), tile.rows(), proj_, to_out(wave, tile));
    });
  }

  // Panels of q, then tiles of each head, then panels of the projection.
  void attend_by_panels(const Wave& wave) const {
    const std::int64_t images = wave.map.batch;
    const int tokens = int(wave.map.tokens());
    for_panels(images, inputs_.q, tokens, 1, [&](int p, std::int64_t image, Split::Tile cut, int) {
      const std::int64_t row = image * tokens + cut.begin;
      gemm_panel(rows_of(wave.normed, row, inputs_.width()), cut.rows(), inputs_.q.panel(p), p * kPanel,
                 inputs_.to_queries(wave.queries + row * inner()));
    });
    const Split split = split_rows(images * inputs_.heads.count, tokens, kMinRows, 96, kRowStep);
    parallel_for(images * inputs_.heads.count * split.tiles, [&](std::int64_t item) {
      const MatrixUnit unit;
      const auto tile = split.tile(item);
      const std::int64_t image = tile.image / inputs_.heads.count, at = (image * tokens + tile.begin) * inner();
      const auto [scores, probabilities] =
          thread_scratch().take(wave.kv.scores(tile.rows()), wave.kv.probabilities(tile.rows()));
      wave.kv.attend(image, int(tile.image % inputs_.heads.count), tile.rows(), wave.queries + at, scores,
                     probabilities, wave.values + at);
    });
    for_panels(images, proj_, tokens, 1, [&](int p, std::int64_t image, Split::Tile cut, int) {
      cut.image = image;
      gemm_panel(rows_of(wave.values, image * tokens + cut.begin, inner()), cut.rows(), proj_.panel(p), p * kPanel,
                 to_out(wave, cut));
    });
  }

  Epilogue<T> to_out(const Wave& wave, const Split::Tile& tile) const {
    const std::ptrdiff_t at = tile.image * wave.map.tokens() * inputs_.heads.channels;
    Epilogue<T> epilogue =
        add_rows(wave.out + at, wave.x + at, wave.scale(tile.image), inputs_.heads.channels, proj_.bias.data());
    epilogue.places = wave.places + tile.begin;
    return epilogue;
  }

  AttentionInputs<T, E> inputs_;
  PackedMatrix<E> proj_;
};
