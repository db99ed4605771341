// x + scale * proj(softmax(q k^T) v), y = LayerNorm(x), q = y Wq, k and v from the reduced map of y.
// Compiled once per ISA: included by isa/kernels-inl.h, which says how.
//
// y is computed once, its tokens ordered by the patch of the reducing convolution that they fall into: then the
// convolution is a GEMM over rows of whole patches, and queries are the same memory as rows of tokens. Keys and values
// are packed as the right-hand sides of the products to come. Queries then go all the way to the output in tiles, so
// that q, scores, probabilities and their product with v stay in cache; where weights are large and the map small, each
// step is shared out by panels instead, so that every weight is read once. Heads are padded to whole narrow panels,
// with zero weights, so that any head width works.

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
    sr_ = pack_conv<E, T>(w.sr, channels_, channels_, sr_ratio_, true, int(normed_width()));
    sr_norm_ = PackedNorm(w.sr_norm, channels_, static_cast<const T*>(nullptr));
  }

  int channels() const override { return channels_; }
  int least_side() const override { return linear_ ? 1 : sr_ratio_; }

  void run(const void* x, Map map, const void* residual_scale, void* out) const override {
    const Shape shape(*this, map);
    // images at a time, so that a large batch takes bounded memory
    const std::size_t packed_keys = heads_ * (shape.k.size() + shape.v.size());
    const std::size_t image_bytes = (map.tokens() * normed_width() + packed_keys) * sizeof(E);
    const std::int64_t most = std::max<std::int64_t>(1, kWaveBytes / image_bytes);
    for (std::int64_t first = 0; first < map.batch; first += most) {
      const std::int64_t images = std::min(most, map.batch - first);
      const std::ptrdiff_t at = first * map.tokens() * channels_;
      const T* scale = static_cast<const T*>(residual_scale);
      Wave wave{shape, static_cast<const T*>(x) + at, static_cast<T*>(out) + at, scale ? scale + first : nullptr,
                images};
      take_buffers(wave);
      norm_tokens(wave);
      make_keys(wave);
      wave.by_panels ? attend_by_panels(wave) : attend_by_tiles(wave);
    }
  }

 private:
  static constexpr int kPool = 7;
  static constexpr std::size_t kWaveBytes = std::size_t{8} << 20;

  // The map, the reduced map, and how a head's keys (head_width x keys) and values (keys x head_width) are packed.
  struct Shape {
    Shape(const AttentionOp& op, Map m)
        : map(m),
          height(m.height / op.sr_ratio_),
          width(m.width / op.sr_ratio_),
          keys(op.linear_ ? kPool * kPool : height * width),
          k(op.head_width_, keys),
          v(keys, op.head_width_) {}
    Map map;
    int height, width, keys;
    PanelLayout<E> k, v;
    std::size_t score_width() const { return k.columns; }
  };

  // Some images on their way, and the memory that threads share for them.
  struct Wave {
    const Shape& shape;
    const T* x;
    T* out;
    const T* residual_scale;
    std::int64_t images;
    bool by_panels = false;
    E* normed = nullptr;           // (images, tokens, normed_width), tokens in the order of patches
    int* places = nullptr;         // (tokens): which of an image's tokens lies there in `normed`
    E* source = nullptr;           // (images, keys, normed_width): pooled, then reduced and normalised tokens
    float* reduced = nullptr;      // (parts, images, keys, normed_width)
    E *k = nullptr, *v = nullptr;  // (images, heads) packed matrices
    E *queries = nullptr, *values = nullptr;  // (images, tokens, inner), by panels only
    float* zeros = nullptr;                   // the bias of products that have none

    std::int64_t tokens() const { return shape.map.tokens(); }
    float scale(std::int64_t image) const { return residual_scale ? to_float(residual_scale[image]) : 1.0f; }
  };

  int inner() const { return heads_ * head_width_; }
  std::size_t normed_width() const { return row_width(channels_); }
  std::size_t patch_width() const { return sr_ratio_ * sr_ratio_ * normed_width(); }
  static constexpr int kPartDepth = 1024;
  int reducing_parts() const { return (sr_.layout.depth + kPartDepth - 1) / kPartDepth; }

  void take_buffers(Wave& wave) const {
    const Shape& shape = wave.shape;
    const std::size_t rows = wave.images * wave.tokens(), keys = wave.images * shape.keys, heads = wave.images * heads_;
    const std::size_t weights = 2 * std::size_t(channels_) * inner() * sizeof(E);
    wave.by_panels = wave.images < max_threads() && weights > l2_bytes() / 4 &&
                     3 * rows * inner() * sizeof(E) <= max_threads() * l2_bytes() / 4;
    // a tile of the matrix unit reaches past the last row
    const std::size_t normed_size = rows * normed_width() + row_room(1) * patch_width();
    const std::size_t reduced_size = reduce_ ? row_room(keys) * normed_width() : 0;
    const std::size_t inner_size = wave.by_panels ? row_room(rows) * inner() : 0;
    const std::size_t zeros_size = std::max({shape.score_width(), std::size_t(head_width_), normed_width()});
    std::tie(wave.normed, wave.places, wave.source, wave.reduced, wave.k, wave.v, wave.queries, wave.values,
             wave.zeros) = shared_scratch().take(array<E>(normed_size), array<int>(wave.tokens()),
                                                 array<E>(reduced_size), array<float>(reduced_size * reducing_parts()),
                                                 array<E>(heads * shape.k.size()), array<E>(heads * shape.v.size()),
                                                 array<E>(inner_size), array<E>(inner_size), array<float>(zeros_size));
    std::memset(wave.zeros, 0, zeros_size * sizeof(float));
  }

  // LayerNorm of all tokens, into the order of patches: [patch][dy][dx], then those that fall into no patch.
  void norm_tokens(const Wave& wave) const {
    const Shape& shape = wave.shape;
    const int height = shape.map.height, width = shape.map.width, sr = sr_ratio_;
    const int inside = shape.width * sr, outside = width - inside, patches = shape.height * shape.width * sr * sr;
    const Split split = split_light(wave.images, height, width * channels_);
    parallel_for(wave.images * split.tiles, [&](std::int64_t item) {
      const auto tile = split.tile(item);
      const T* from = wave.x + (tile.image * height + tile.begin) * width * channels_;
      E* normed = wave.normed + tile.image * wave.tokens() * normed_width();
      NormRows<T, E> rows(norm_, int(normed_width()));
      for (int y = tile.begin; y < tile.end; ++y) {
        const bool whole = y < shape.height * sr;
        for (int x = 0; x < width; ++x, from += channels_) {
          int row;
          if (whole && x < inside)
            row = ((y / sr * shape.width + x / sr) * sr + y % sr) * sr + x % sr;
          else if (whole)
            row = patches + y * outside + x - inside;
          else
            row = patches + shape.height * sr * outside + (y - shape.height * sr) * width + x;
          rows.add(from, normed + row * normed_width());
          if (tile.image == 0) wave.places[row] = y * width + x;
        }
      }
    });
  }

  // Keys and values of all images, packed into wave.k and wave.v.
  void make_keys(const Wave& wave) const {
    const int keys = wave.shape.keys;
    const E* source = wave.normed;
    if (reduce_) {
      if (linear_) pool(wave);
      const E* patches = linear_ ? wave.source : wave.normed;
      const std::size_t image_size = linear_ ? keys * normed_width() : wave.tokens() * normed_width();
      // few rows and columns, long sums: these are shared out too, in parts that do not depend on the threads
      const std::ptrdiff_t part_size = wave.images * keys * normed_width();
      for_panels(wave.images, sr_, keys, reducing_parts(), [&](int p, std::int64_t image, Split::Tile cut, int part) {
        const int begin = part * kPartDepth, end = std::min(begin + kPartDepth, sr_.layout.depth);
        Rows<E> a = rows_of(patches + image * image_size, cut.begin, patch_width());
        a.data += begin;
        float* to = wave.reduced + part * part_size + (image * keys + cut.begin) * normed_width();
        gemm_panel(a, cut.rows(), sr_.panel(p).part(begin, end), p * kPanel,
                   store_rows(to, normed_width(), part == 0 ? sr_.bias.data() : wave.zeros));
      });
      const Split rows = split_light(1, wave.images * keys, normed_width());
      parallel_for(rows.tiles, [&](std::int64_t item) {
        const auto tile = rows.tile(item);
        linear_ ? finish_reduced<Activation::gelu>(wave, tile) : finish_reduced<Activation::none>(wave, tile);
      });
      source = wave.source;
    }
    for_panels(wave.images, kv_, keys, 1, [&](int p, std::int64_t image, Split::Tile cut, int) {
      E* rows = std::get<0>(thread_scratch().take(array<E>(cut.rows() * kPanel)));
      const int width = kv_.layout.width(p);
      Epilogue<E> to_rows = store_rows(rows, width, kv_.bias.data() + p * kPanel);
      gemm_panel(rows_of(source, image * keys + cut.begin, normed_width()), cut.rows(), kv_.panel(p), 0, to_rows);
      pack_keys(wave, image, p * kPanel, width, rows, cut);
    });
  }

  // Rows of the reduced maps: their parts added up, normalised.
  template <Activation kActivation>
  void finish_reduced(const Wave& wave, const Split::Tile& tile) const {
    const std::ptrdiff_t part_size = wave.images * wave.shape.keys * normed_width();
    NormRows<float, E, kActivation> rows(sr_norm_, int(normed_width()));
    for (std::int64_t r = tile.begin; r < tile.end; ++r) {
      float* from = wave.reduced + r * normed_width();
      for (int part = 1; part < reducing_parts(); ++part)
        for (std::size_t i = 0; i < normed_width(); i += kLanes)
          store(from + i, load(from + i) + load(from + part * part_size + i));
      rows.add(from, wave.source + r * normed_width());
    }
  }

  // Columns [column, column + width) of the product with kv_, for the keys of `cut`, into the packed matrices. Keys
  // past the last one become zero: they poison neither the scores nor the product with zero probabilities.
  void pack_keys(const Wave& wave, std::int64_t image, int column, int width, const E* rows, Split::Tile cut) const {
    constexpr int kStep = kDepthStep<E> == 1 ? 1 : 2;  // between neighbouring columns of a packed matrix
    const Shape& shape = wave.shape;
    const bool last = cut.end == shape.keys;
    for (int i = 0, count; i < width; i += count) {  // columns of one matrix, within a panel of its layout
      // a head's key and value lie side by side
      const int n = (column + i) % head_width_;
      count = std::min({width - i, head_width_ - n, kPanel - n % kPanel});
      const std::int64_t head = image * heads_ + (column + i) / head_width_ / 2;
      const E* from = rows + i;
      if ((column + i) / head_width_ % 2 == 0) {
        E* k = wave.k + head * shape.k.size();
        const int end = last ? shape.k.columns : cut.end;
        for (int start = cut.begin, stop; start < end; start = stop) {
          stop = std::min(end, (start / kPanel + 1) * kPanel);
          for (int c = 0; c < count; ++c) {
            E* to = k + shape.k.index(n + c, start);
            for (int key = start; key < std::min(stop, cut.end); ++key, to += kStep)
              *to = from[(key - cut.begin) * width + c];
            for (int key = std::max(start, cut.end); key < stop; ++key, to += kStep) *to = E{};
          }
        }
      } else {
        E* v = wave.v + head * shape.v.size();
        const int end = last ? shape.v.depth : cut.end;
        for (int key = cut.begin; key < end; ++key) {
          E* to = v + shape.v.index(key, n);
          const E* row = from + (key - cut.begin) * width;
          for (int c = 0; c < count; ++c) to[c * kStep] = key < cut.end ? row[c] : E{};
        }
      }
    }
  }

  // The means of torch's adaptive pooling of normalised tokens: bins overlap where 7 does not divide.
  void pool(const Wave& wave) const {
    const int height = wave.shape.map.height, width = wave.shape.map.width;
    parallel_for(wave.images * kPool * kPool, [&](std::int64_t item) {
      const int y = int(item / kPool % kPool), c = int(item % kPool);
      const int y0 = y * height / kPool, y1 = ((y + 1) * height + kPool - 1) / kPool;
      const int x0 = c * width / kPool, x1 = ((c + 1) * width + kPool - 1) / kPool;
      const E* normed = wave.normed + item / (kPool * kPool) * wave.tokens() * normed_width();
      const float share = 1.0f / ((y1 - y0) * (x1 - x0));
      for (std::size_t i = 0; i < normed_width(); i += kLanes) {
        Vec total{};
        for (int row = y0; row < y1; ++row) {
          Vec some{};
          for (int column = x0; column < x1; ++column)
            some += load(normed + (std::int64_t(row) * width + column) * normed_width() + i);
          total += some;
        }
        store(wave.source + item * normed_width() + i, total * share);
      }
    });
  }

  // Tiles of queries, from q to the output.
  void attend_by_tiles(const Wave& wave) const {
    const Shape& shape = wave.shape;
    const std::size_t row_bytes = 2 * inner() * sizeof(E) + shape.score_width() * (sizeof(float) + sizeof(E));
    const std::int64_t most = std::clamp<std::int64_t>(l2_bytes() / 4 / row_bytes, kLeastRows, 96);
    const Split split = split_rows(wave.images, wave.tokens(), kLeastRows, most, kRowStep);
    parallel_for(wave.images * split.tiles, [&](std::int64_t item) {
      const MatrixUnit unit;
      const auto tile = split.tile(item);
      const std::size_t room = row_room(tile.rows()) * inner();
      const auto [queries, values, scores, probabilities] = thread_scratch().take(
          array<E>(room), array<E>(room), scores_array(shape, tile), probabilities_array(shape, tile));
      const std::int64_t row = tile.image * wave.tokens() + tile.begin;
      gemm(rows_of(wave.normed, row, normed_width()), tile.rows(), q_, to_queries(queries));
      for (int h = 0; h < heads_; ++h) attend_head(wave, tile, h, queries, scores, probabilities, values);
      gemm(rows_of(values, 0, inner()), tile.rows(), proj_, to_out(wave, tile));
    });
  }

  // Panels of q, then tiles of each head, then panels of the projection.
  void attend_by_panels(const Wave& wave) const {
    const Shape& shape = wave.shape;
    const int tokens = int(wave.tokens());
    for_panels(wave.images, q_, tokens, 1, [&](int p, std::int64_t image, Split::Tile cut, int) {
      const std::int64_t row = image * tokens + cut.begin;
      gemm_panel(rows_of(wave.normed, row, normed_width()), cut.rows(), q_.panel(p), p * kPanel,
                 to_queries(wave.queries + row * inner()));
    });
    const Split split = split_rows(wave.images * heads_, tokens, kLeastRows, 96, kRowStep);
    parallel_for(wave.images * heads_ * split.tiles, [&](std::int64_t item) {
      const MatrixUnit unit;
      auto tile = split.tile(item);
      const int head = int(tile.image % heads_);
      tile.image /= heads_;
      const auto [scores, probabilities] =
          thread_scratch().take(scores_array(shape, tile), probabilities_array(shape, tile));
      const std::int64_t at = (tile.image * tokens + tile.begin) * inner();
      attend_head(wave, tile, head, wave.queries + at, scores, probabilities, wave.values + at);
    });
    for_panels(wave.images, proj_, tokens, 1, [&](int p, std::int64_t image, Split::Tile cut, int) {
      cut.image = image;
      gemm_panel(rows_of(wave.values, image * tokens + cut.begin, inner()), cut.rows(), proj_.panel(p), p * kPanel,
                 to_out(wave, cut));
    });
  }

  // Scores of one head's tile of queries, and their probabilities.
  static Array<float> scores_array(const Shape& shape, const Split::Tile& tile) {
    return array<float>(tile.rows() * shape.score_width());
  }
  static Array<E> probabilities_array(const Shape& shape, const Split::Tile& tile) {
    return array<E>(row_room(tile.rows()) * shape.score_width());
  }

  // softmax(q k^T) v of one head for a tile of queries; rows of `queries` and `values` hold all heads.
  void attend_head(const Wave& wave, const Split::Tile& tile, int head, const E* queries, float* scores,
                   E* probabilities, E* values) const {
    const Shape& shape = wave.shape;
    const std::size_t width = shape.score_width();
    const std::int64_t matrix = tile.image * heads_ + head;
    for (int p = 0; p < shape.k.panels(); ++p)
      gemm_panel(rows_of(queries + head * head_width_, 0, inner()), tile.rows(),
                 shape.k.panel(wave.k + matrix * shape.k.size(), p), p * kPanel, store_rows(scores, width, wave.zeros));
    softmax_rows(scores, tile.rows(), shape.keys, int(width), probabilities);
    Epilogue<E> to_values = store_rows(values + head * head_width_, inner(), wave.zeros);
    to_values.columns = head_width_;
    for (int p = 0; p < shape.v.panels(); ++p)
      gemm_panel(rows_of(probabilities, 0, width), tile.rows(), shape.v.panel(wave.v + matrix * shape.v.size(), p),
                 p * kPanel, to_values);
  }

  Epilogue<E> to_queries(E* queries) const {
    Epilogue<E> epilogue = store_rows(queries, inner(), q_.bias.data());
    epilogue.multiply = scale_;
    return epilogue;
  }
  Epilogue<T> to_out(const Wave& wave, const Split::Tile& tile) const {
    const std::ptrdiff_t at = tile.image * wave.tokens() * channels_;
    Epilogue<T> epilogue = add_rows(wave.out + at, wave.x + at, wave.scale(tile.image), channels_, proj_.bias.data());
    epilogue.places = wave.places + tile.begin;
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
