// x + scale * proj(softmax(q k^T) v), y = LayerNorm(x), q = y Wq, k and v from the reduced map of y.
//
// Two phases. First, tiles of reduced tokens become keys and values, packed as the right-hand sides of the products to
// come. Then, tiles of queries go all the way to the output: q, scores, probabilities and their product with v stay in
// cache. Heads are padded to whole panels, with zero weights, so that any head width works.

template <class T, class E>
class AttentionOp final : public ResidualOp {
 public:
  explicit AttentionOp(const AttentionWeights& w)
      : channels_(w.channels),
        heads_(w.heads),
        sr_ratio_(w.sr.weight == nullptr ? 1 : w.sr_ratio),
        reduce_(w.sr.weight != nullptr),
        linear_(w.linear),
        head_width_(int(row_width(w.channels / w.heads))),
        scale_(w.scale * 1.4426950408889634f),
        norm_(w.norm, w.channels, static_cast<const T*>(nullptr)),
        q_(pack_heads(w.q, 1)),
        kv_(pack_heads(w.kv, 2)),
        proj_(pack_projection(w.proj)) {
    if (!reduce_) return;
    sr_ = pack_conv<E, T>(w.sr, channels_, channels_, sr_ratio_, true);
    sr_norm_ = PackedNorm(w.sr_norm, channels_, static_cast<const T*>(nullptr));
  }

  void run(const void* x, Map map, const void* residual_scale, void* out) const override {
    const Keys keys(*this, map);
    // images at a time, so that the keys and values of a large batch take bounded memory
    const std::size_t image_bytes = 2 * sizeof(E) * heads_ * std::max(keys.k_size, keys.v_size);
    const std::int64_t wave = std::max<std::int64_t>(max_threads(), (std::size_t{16} << 20) / image_bytes);
    for (std::int64_t first = 0; first < map.batch; first += wave) {
      const std::int64_t count = std::min(wave, map.batch - first);
      run_wave(static_cast<const T*>(x), map, first, count, static_cast<const T*>(residual_scale), static_cast<T*>(out),
               keys);
    }
  }

 private:
  // The reduced map, and the sizes of a head's packed keys (head_width x count) and values (count x head_width).
  struct Keys {
    Keys(const AttentionOp& op, Map map)
        : height(op.linear_ ? kPool : map.height / op.sr_ratio_),
          width(op.linear_ ? kPool : map.width / op.sr_ratio_),
          count(height * width),
          depth(int(round_up(count, kDepthStep<E>))),
          k_size(PackedMatrix<E>::size(op.head_width_, count)),
          v_size(PackedMatrix<E>::size(count, op.head_width_)) {}
    int height, width, count, depth;
    std::size_t k_size, v_size;
  };
  static constexpr int kPool = 7;

  int inner() const { return heads_ * head_width_; }
  std::size_t normed_width() const { return row_width(channels_); }
  std::size_t reduction_width() const { return row_width(std::size_t(sr_ratio_) * sr_ratio_ * channels_); }

  void run_wave(const T* x, Map map, std::int64_t first, std::int64_t count, const T* residual_scale, T* out,
                const Keys& keys) const {
    const std::size_t k_room = std::size_t(count) * heads_ * keys.k_size;
    const std::size_t v_room = std::size_t(count) * heads_ * keys.v_size;
    const std::size_t zeros_size = std::max<std::size_t>(row_width(keys.count), head_width_);
    Scratch& shared = shared_scratch();
    shared.reset(Scratch::bytes_for<E>(k_room) + Scratch::bytes_for<E>(v_room) + Scratch::bytes_for<float>(zeros_size));
    E* k = shared.take<E>(k_room);
    E* v = shared.take<E>(v_room);
    float* zeros = shared.take<float>(zeros_size);  // the bias of products that have none
    std::memset(zeros, 0, zeros_size * sizeof(float));

    const std::size_t budget = l2_bytes() / 3;
    const std::size_t key_row = (reduction_width() + normed_width() + 2 * inner()) * sizeof(E) + normed_width() * 4;
    const Split key_split = split_rows(count, keys.count, std::max<std::size_t>(kTileRows, budget / key_row));
    parallel_for(count * key_split.tiles, [&](std::int64_t item) {
      const auto tile = key_split.tile(item);
      const std::int64_t at = tile.image * heads_;
      make_keys(x + (first + tile.image) * map.tokens() * channels_, map, tile, keys, k + at * keys.k_size,
                v + at * keys.v_size);
    });

    const std::size_t query_row =
        (normed_width() + 2 * inner()) * sizeof(E) + row_width(keys.count) * (sizeof(float) + sizeof(E));
    const std::int64_t most = std::clamp<std::int64_t>(budget / query_row, 4, 8 * kTileRows);
    const Split split = split_rows(count, map.tokens(), most);
    parallel_for(count * split.tiles, [&](std::int64_t item) {
      auto tile = split.tile(item);
      const std::int64_t at = tile.image * heads_;
      const E* image_k = k + at * keys.k_size;
      const E* image_v = v + at * keys.v_size;
      tile.image += first;
      const float scale = residual_scale ? to_float(residual_scale[tile.image]) : 1.0f;
      attend(x, map, tile, keys, image_k, image_v, zeros, scale, out);
    });
  }

  // Keys and values of reduced tokens [tile.begin, tile.end) of one image, packed into k and v.
  void make_keys(const T* x, Map map, Split::Tile tile, const Keys& keys, E* k, E* v) const {
    const MatrixUnit unit;
    const int rows = int(tile.end - tile.begin);
    const std::size_t wide = reduce_ ? reduction_width() : normed_width(), room = row_room(rows);
    Scratch& scratch = thread_scratch();
    scratch.reset(Scratch::bytes_for<E>(room * wide) + Scratch::bytes_for<E>(room * normed_width()) +
                  Scratch::bytes_for<E>(room * 2 * inner()) + Scratch::bytes_for<float>((rows + 2) * normed_width()));
    E* gathered = scratch.take<E>(room * wide);
    E* normed = scratch.take<E>(room * normed_width());
    E* kv = scratch.take<E>(room * 2 * inner());
    float* reduced = scratch.take<float>((rows + 2) * normed_width());

    for (int r = 0; r < rows; ++r) {
      const int y = int(tile.begin + r) / keys.width, c = int(tile.begin + r) % keys.width;
      E* row = gathered + r * wide;
      if (linear_)
        pool(x, map, y, c, reduced, row);
      else
        gather(x, map, y, c, row, wide);
    }
    const E* source = gathered;
    if (reduce_) {
      gemm(gathered, wide, rows, sr_, plain(reduced, normed_width(), sr_.bias.data()));
      for (int r = 0; r < rows; ++r) {
        const float* from = reduced + r * normed_width();
        E* to = normed + r * normed_width();
        if (linear_)
          layer_norm_row<Activation::gelu>(from, sr_norm_, to, int(normed_width()));
        else
          layer_norm_row(from, sr_norm_, to, int(normed_width()));
      }
      source = normed;
    }
    gemm(source, normed_width(), rows, kv_, plain(kv, 2 * inner(), kv_.bias.data()));
    for (int r = 0; r < rows; ++r)
      for (int h = 0; h < heads_; ++h)
        pack_key(kv + (2 * h) * head_width_ + std::size_t(r) * 2 * inner(), int(tile.begin) + r, keys,
                 k + h * keys.k_size, v + h * keys.v_size);
    if (tile.end == keys.count) clear_padding(keys, k, v);
  }

  // One key and its value (which follows it in `kv`) into a head's packed matrices.
  void pack_key(const E* kv, int key, const Keys& keys, E* k, E* v) const {
    for (int i = 0; i < head_width_; ++i) {
      k[packed_index<E>(head_width_, i, key)] = kv[i];
      v[packed_index<E>(keys.depth, key, i)] = kv[head_width_ + i];
    }
  }

  // Keys past the last one: zero, so that they neither poison the scores nor the product with zero probabilities.
  void clear_padding(const Keys& keys, E* k, E* v) const {
    for (int h = 0; h < heads_; ++h)
      for (int i = 0; i < head_width_; ++i) {
        for (int key = keys.count; key < int(row_width(keys.count)); ++key)
          k[h * keys.k_size + packed_index<E>(head_width_, i, key)] = E{};
        for (int key = keys.count; key < keys.depth; ++key)
          v[h * keys.v_size + packed_index<E>(keys.depth, key, i)] = E{};
      }
  }

  // The sr_ratio x sr_ratio normalised tokens of reduced token (y, c), [dy][dx][channel], zero-padded to `wide`.
  void gather(const T* x, Map map, int y, int c, E* row, std::size_t wide) const {
    const int used = sr_ratio_ * sr_ratio_ * channels_;
    for (int dy = 0; dy < sr_ratio_; ++dy)
      for (int dx = 0; dx < sr_ratio_; ++dx) {
        const std::int64_t token = std::int64_t(y * sr_ratio_ + dy) * map.width + c * sr_ratio_ + dx;
        layer_norm_row(x + token * channels_, norm_, row + (dy * sr_ratio_ + dx) * channels_, channels_);
      }
    std::fill(row + used, row + wide, E{});
  }

  // The mean of the normalised tokens in bin (y, c) of torch's adaptive pooling: bins overlap where 7 does not divide.
  void pool(const T* x, Map map, int y, int c, float* rows, E* out) const {
    const int y0 = y * map.height / kPool, y1 = ((y + 1) * map.height + kPool - 1) / kPool;
    const int x0 = c * map.width / kPool, x1 = ((c + 1) * map.width + kPool - 1) / kPool;
    float* total = rows;
    float* normed = rows + normed_width();
    std::fill(total, total + normed_width(), 0.0f);
    for (int row = y0; row < y1; ++row)
      for (int column = x0; column < x1; ++column) {
        layer_norm_row(x + (std::int64_t(row) * map.width + column) * channels_, norm_, normed, int(normed_width()));
        for (std::size_t i = 0; i < normed_width(); i += kLanes) store(total + i, load(total + i) + load(normed + i));
      }
    const float share = 1.0f / ((y1 - y0) * (x1 - x0));
    for (std::size_t i = 0; i < normed_width(); i += kLanes) store(out + i, load(total + i) * share);
  }

  // Queries [tile.begin, tile.end) of one image, from LayerNorm to the residual sum.
  void attend(const T* x, Map map, Split::Tile tile, const Keys& keys, const E* k, const E* v, const float* zeros,
              float residual_scale, T* out) const {
    const MatrixUnit unit;
    const int rows = int(tile.end - tile.begin);
    const std::size_t room = row_room(rows), score_width = row_width(keys.count);
    const std::size_t wide = std::max<std::size_t>(normed_width(), inner());
    Scratch& scratch = thread_scratch();
    scratch.reset(Scratch::bytes_for<E>(room * wide) + Scratch::bytes_for<E>(room * inner()) +
                  Scratch::bytes_for<float>(rows * score_width) + Scratch::bytes_for<E>(room * score_width));
    E* normed = scratch.take<E>(room * wide);
    E* queries = scratch.take<E>(room * inner());
    float* scores = scratch.take<float>(rows * score_width);
    E* probabilities = scratch.take<E>(room * score_width);

    const std::ptrdiff_t at = (tile.image * map.tokens() + tile.begin) * channels_;
    for (int r = 0; r < rows; ++r)
      layer_norm_row(x + at + std::ptrdiff_t(r) * channels_, norm_, normed + r * normed_width(), int(normed_width()));
    Epilogue<E> to_queries = plain(queries, inner(), q_.bias.data());
    to_queries.multiply = scale_;
    gemm(normed, normed_width(), rows, q_, to_queries);

    E* values = normed;  // the normalised rows have done their work
    for (int h = 0; h < heads_; ++h) {
      const Epilogue<float> to_scores = plain(scores, score_width, zeros);
      for (std::size_t n = 0; n < score_width; n += kPanel)
        gemm_panel(queries + h * head_width_, inner(), rows, k + h * keys.k_size + n * head_width_, head_width_, int(n),
                   to_scores);
      for (int r = 0; r < rows; ++r)
        softmax_row(scores + r * score_width, keys.count, int(score_width), probabilities + r * score_width);
      const Epilogue<E> to_values = plain(values + h * head_width_, inner(), zeros);
      for (int n = 0; n < head_width_; n += kPanel)
        gemm_panel(probabilities, score_width, rows, v + h * keys.v_size + std::size_t(n) * keys.depth, keys.depth, n,
                   to_values);
    }

    Epilogue<T> to_out{};
    to_out.out = out + at;
    to_out.ld = channels_;
    to_out.columns = channels_;
    to_out.bias = proj_.bias.data();
    to_out.residual = x + at;
    to_out.residual_scale = residual_scale;
    gemm(values, inner(), rows, proj_, to_out);
  }

  // Rows of `ld` columns, all stored.
  template <class Out>
  static Epilogue<Out> plain(Out* out, std::size_t ld, const float* bias) {
    Epilogue<Out> epilogue{};
    epilogue.out = out;
    epilogue.ld = ld;
    epilogue.columns = int(ld);
    epilogue.bias = bias;
    return epilogue;
  }

  // q (parts = 1) or kv (parts = 2): each head's columns padded to head_width_. A head's key and value lie side by
  // side.
  PackedMatrix<E> pack_heads(const Linear& linear, int parts) const {
    const int head = channels_ / heads_;
    const T* weight = static_cast<const T*>(linear.weight);
    const T* bias = static_cast<const T*>(linear.bias);
    auto row = [&](int n) -> std::ptrdiff_t {  // torch's row of packed column n, or -1 for padding
      const int i = n % head_width_, part = n / head_width_ % parts, h = n / head_width_ / parts;
      return i < head ? std::ptrdiff_t(part) * channels_ + h * head + i : -1;
    };
    return pack<E>(
        channels_, parts * inner(),
        [&](int k, int n) { return row(n) < 0 ? 0.0f : to_float(weight[row(n) * channels_ + k]); },
        [&](int n) { return bias == nullptr || row(n) < 0 ? 0.0f : to_float(bias[row(n)]); });
  }

  PackedMatrix<E> pack_projection(const Linear& linear) const {
    const int head = channels_ / heads_;
    const T* weight = static_cast<const T*>(linear.weight);
    const T* bias = static_cast<const T*>(linear.bias);
    return pack<E>(
        inner(), channels_,
        [&](int k, int n) {
          const int i = k % head_width_, h = k / head_width_;
          return i < head ? to_float(weight[std::ptrdiff_t(n) * channels_ + h * head + i]) : 0.0f;
        },
        [&](int n) { return bias ? to_float(bias[n]) : 0.0f; });
  }

  int channels_, heads_, sr_ratio_;
  bool reduce_, linear_;
  int head_width_;
  float scale_;  // of the scores, times log2(e): the softmax works in powers of two
  PackedNorm norm_, sr_norm_;
  PackedMatrix<E> q_, kv_, proj_, sr_;
};
