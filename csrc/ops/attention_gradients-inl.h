// Gradients of the attention op: out = x + scale * proj(softmax(q k^T) v), see attention-inl.h.
// Compiled once per ISA: included by isa/kernels-inl.h, which says how.
//
// Everything is computed again from x; probabilities live for one tile of queries and one head. A tile goes from q and
// the gradient of the heads' values, through the softmax, to the gradient of q and its share of that of LayerNorm's
// output; its part of the gradients of keys and values is summed per item. Keys and values then go back through their
// matrix and the reduction. Matrices' gradients are products over all tokens (MatrixGradient). Tokens lie in the order
// of the reducing convolution's patches throughout, so that its gradient is added in place.

template <class T, class E>
class AttentionGradientsOp final : public ResidualGradients {
 public:
  explicit AttentionGradientsOp(const AttentionWeights& w)
      : inputs_(w),
        scale_(w.scale),
        q_back_(heads().template pack_inputs_backward<E, T>(w.q, 1)),
        kv_back_(heads().template pack_inputs_backward<E, T>(w.kv, 2)),
        proj_back_(heads().template pack_projection_backward<E, T>(w.proj)),
        reduction_(w, inputs_.reduction) {}

  int channels() const override { return heads().channels; }
  int min_side() const override { return inputs_.reduction.min_side(); }
  std::vector<std::size_t> sizes() const override {
    const std::size_t c = channels(), r = inputs_.reduction.reduces() ? 1 : 0, kernel = inputs_.reduction.ratio();
    return {c, c, c * c, c, 2 * c * c, 2 * c, r * c * c * kernel * kernel, r * c, r * c, r * c, c * c, c};
  }

  void run(const void* x, Map map, const void* residual_scale, const void* grad_out, void* grad_x,
           float* const* grads) const override {
    Call call(*this, map);
    call.x = static_cast<const T*>(x), call.grad_out = static_cast<const T*>(grad_out);
    call.residual_scale = static_cast<const T*>(residual_scale);
    take_buffers(call);
    inputs_.norm_tokens(map, call.x, call.normed, call.places);
    scale_gradient(call);
    make_keys(call);
    parallel_for(map.batch * call.parts, [&](std::int64_t item) { attend(call, item); });
    matrix_gradients(call, grads);
    gather_keys(call, grads);
    if (inputs_.reduction.reduces())
      reduction_.run(inputs_.reduction, map, call.reduction, call.normed, call.kv.zeros, call.grad_reduced,
                     call.grad_normed, grads + kSr);
    finish_rows(call, static_cast<T*>(grad_x), grads);
  }

 private:
  enum Gradient { kNormWeight, kNormBias, kQ, kQBias, kKv, kKvBias, kSr, kProj = kSr + 4, kProjBias };

  struct Call {
    Call(const AttentionGradientsOp& op, const Map& map)
        : map(map),
          kv(op.heads(), op.inputs_.reduction.keys(map)),
          turned(kv),
          over_tokens(1, map.batch * map.tokens(), op.width(), op.inner()),
          over_keys(1, map.batch * kv.keys, op.width(), 2 * op.inner()),
          rows(map.batch * map.tokens(), op.width()) {
      turned.turned = 1;
      // tiles of at least some tokens, as sums over them are read and written for each
      const std::size_t row_bytes = 4 * op.inner() * sizeof(E) + kv.score_width() * (2 * sizeof(float) + 4 * sizeof(E));
      tile = int(std::clamp<std::int64_t>(l2_bytes() / 2 / row_bytes, 2 * kMinRows, 128));
      const std::int64_t most = std::max<std::int64_t>(1, map.tokens() / std::max<std::int64_t>(kMinRows, tile / 2));
      parts =
          std::clamp<std::int64_t>((gradient_items() + map.batch - 1) / std::max<std::int64_t>(map.batch, 1), 1, most);
    }

    Map map;
    const T *x, *grad_out, *residual_scale;
    KeysValues<E> kv, turned;  // keys and values as the forward packs them, and the other way round
    MatrixGradient<E> over_tokens, over_keys;
    NormGradients<E> rows;
    int tile;                                      // tokens that are worked on together
    std::int64_t parts;                            // items of an image
    E *normed = nullptr, *grad = nullptr;          // (tokens, width): LayerNorm(x), scale * grad_out
    E *values = nullptr, *grad_queries = nullptr;  // (tokens, inner)
    float* grad_normed = nullptr;                  // (tokens, width)
    float* grad_keys_parts = nullptr;              // (items, heads, 2, keys, head width)
    float* query_biases = nullptr;                 // (items, inner)
    E* grad_keys = nullptr;                        // (images, keys, 2 inner), columns as the packed matrix has them
    float* grad_reduced = nullptr;                 // (images, keys, width)
    E* transposed = nullptr;
    float *matrix_sums = nullptr, *row_sums = nullptr;
    int* places = nullptr;
    typename ReductionGradients<T, E>::Buffers reduction;

    float scale(std::int64_t image) const { return residual_scale ? to_float(residual_scale[image]) : 1.0f; }
  };

  const Heads& heads() const { return inputs_.heads; }
  std::size_t inner() const { return heads().inner(); }
  std::size_t width() const { return inputs_.width(); }
  // Of an item's sums.
  std::size_t keys_size(const Call& call) const { return 2 * inner() * call.kv.keys; }

  void take_buffers(Call& call) const {
    KeysValues<E>&kv = call.kv, &turned = call.turned;
    const std::size_t tokens = call.map.batch * call.map.tokens(), keys = call.map.batch * kv.keys;
    const std::size_t matrices = call.map.batch * heads().count, items = call.map.batch * call.parts;
    const std::size_t zeros_size = std::max({kv.score_width(), inner(), width(), inputs_.reduction.patch_width()});
    const auto reduction = reduction_.sizes(inputs_.reduction, call.map);
    std::tie(call.normed, call.grad, call.values, call.grad_queries, call.grad_normed, call.grad_keys_parts,
             call.query_biases, call.grad_keys, call.grad_reduced, call.transposed, call.matrix_sums, call.row_sums,
             call.places, kv.all_k, kv.all_v, turned.all_k, turned.all_v, kv.zeros, call.reduction.sums,
             call.reduction.pooled, call.reduction.reduced, call.reduction.gradient, call.reduction.transposed,
             call.reduction.matrix_sums, call.reduction.row_sums) =
        shared_scratch().take(
            array<E>(inputs_.normed_size(tokens)), array<E>(row_room(tokens) * width()),
            array<E>(row_room(tokens) * inner()), array<E>(row_room(tokens) * inner()), array<float>(tokens * width()),
            array<float>(items * keys_size(call)), array<float>(items * inner()),
            array<E>(row_room(keys) * 2 * inner()), array<float>(keys * width()),
            array<E>(std::max(call.over_tokens.transposed_size(), call.over_keys.transposed_size())),
            array<float>(std::max(call.over_tokens.sums_size(), call.over_keys.sums_size())),
            array<float>(call.rows.sums_size()), array<int>(call.map.tokens()), array<E>(matrices * kv.k.size()),
            array<E>(matrices * kv.v.size()), array<E>(matrices * kv.k.size()), array<E>(matrices * kv.v.size()),
            array<float>(zeros_size), array<float>(reduction.sums), array<E>(reduction.pooled),
            array<E>(reduction.reduced), array<E>(reduction.gradient), array<E>(reduction.transposed),
            array<float>(reduction.matrix_sums), array<float>(reduction.row_sums));
    turned.zeros = kv.zeros;
    std::memset(kv.zeros, 0, zeros_size * sizeof(float));
  }

  // scale * grad_out, in the order of patches.
  void scale_gradient(const Call& call) const {
    const Map& map = call.map;
    inputs_.for_rows(map, [&](const PatchOrder& order, const Split::Tile& tile) {
      const T* from = call.grad_out + (tile.image * map.height + tile.begin) * map.width * channels();
      for (int y = tile.begin; y < tile.end; ++y)
        for (int x = 0; x < map.width; ++x, from += channels())
          scale_rows(from, 1, channels(), call.scale(tile.image),
                     call.grad + (tile.image * map.tokens() + order.place(y, x)) * width(), width());
    });
  }

  void make_keys(Call& call) const {
    const SpatialReduction<T, E>& reduction = inputs_.reduction;
    if (reduction.reduces())
      // an error of a key is in the gradients of all queries, where it adds up
      reduction.template run<Activation::exact_gelu>(call.map, call.normed, call.kv.zeros, call.reduction.sums,
                                                     call.reduction.pooled, call.reduction.reduced);
    inputs_.make_keys(call.map, source(call),
                      [&](std::int64_t image, int column, int columns, const E* rows, const Split::Tile& cut) {
                        call.kv.pack_columns(image, column, columns, rows, cut);
                        call.turned.pack_columns(image, column, columns, rows, cut);
                      });
  }
  // The rows that keys and values are made of.
  const E* source(const Call& call) const { return inputs_.reduction.reduces() ? call.reduction.reduced : call.normed; }

  // Tiles of an image's queries.
  void attend(const Call& call, std::int64_t item) const {
    const MatrixUnit unit;
    const KeysValues<E>& kv = call.kv;
    const std::int64_t image = item / call.parts, part = item % call.parts, tokens = call.map.tokens();
    const int keys = kv.keys, width = heads().width, tile = call.tile;
    const std::size_t score_width = kv.score_width(), room = row_room(tile) * inner();
    const std::size_t turned_room = row_room(score_width) * depth_of<E>(tile);
    const auto [queries, grad_values, scores, probabilities, grad_scores, turned, woven, some, tile_biases] =
        thread_scratch().take(array<E>(room), array<E>(room), kv.scores(tile), kv.probabilities(tile),
                              kv.probabilities(tile), array<E>(turned_room), array<E>(panel_room<E>(tile)),
                              array<float>(inner()), array<float>(inner()));
    float *sums = call.grad_keys_parts + item * keys_size(call), *biases = call.query_biases + item * inner();
    std::memset(sums, 0, keys_size(call) * sizeof(float));
    std::memset(biases, 0, inner() * sizeof(float));
    const std::int64_t last = (part + 1) * tokens / call.parts;
    for (std::int64_t begin = part * tokens / call.parts; begin < last; begin += tile) {
      const int rows = int(std::min<std::int64_t>(tile, last - begin));
      const std::int64_t row = image * tokens + begin;
      E *values = call.values + row * inner(), *grad_queries = call.grad_queries + row * inner();
      gemm(rows_of(call.normed, row, this->width()), rows, inputs_.q, inputs_.to_queries(queries));
      gemm(rows_of(call.grad, row, this->width()), rows, proj_back_, store_rows(grad_values, inner(), kv.zeros));
      for (int h = 0; h < heads().count; ++h) {
        const std::ptrdiff_t column = h * width;
        const std::int64_t matrix = image * heads().count + h;
        float* to_keys = sums + std::size_t(h) * 2 * keys * width;
        float* to_values = to_keys + std::size_t(keys) * width;
        kv.attend(image, h, rows, queries, scores, probabilities, values);
        add_turned(probabilities, rows, grad_values + column, keys, kv, turned, woven, to_values);
        // the gradient of the probabilities, where the scores were
        for (int p = 0; p < kv.k.panels(); ++p)
          gemm_panel(rows_of(grad_values + column, 0, inner()), rows,
                     kv.k.panel(call.turned.all_k + matrix * kv.k.size(), p), p * kPanel,
                     store_rows(scores, score_width, kv.zeros));
        softmax_gradient(probabilities, scores, rows, int(score_width), grad_scores);
        add_turned(grad_scores, rows, queries + column, keys, kv, turned, woven, to_keys);
        Epilogue<E> epilogue = store_rows(grad_queries + column, inner(), kv.zeros);
        epilogue.columns = width, epilogue.multiply = scale_;
        for (int p = 0; p < kv.v.panels(); ++p)
          gemm_panel(rows_of(grad_scores, 0, score_width), rows,
                     kv.v.panel(call.turned.all_v + matrix * kv.v.size(), p), p * kPanel, epilogue);
      }
      sum_rows(grad_queries, std::ptrdiff_t(inner()), rows, int(inner()), some, tile_biases);
      add_row(tile_biases, int(inner()), biases);
      gemm(rows_of(grad_queries, 0, inner()), rows, q_back_,
           store_rows(call.grad_normed + row * this->width(), this->width(), kv.zeros));
    }
  }

  // to (keys, head width) += the transposed of `a` (rows, keys) times a head's columns b of rows.
  void add_turned(const E* a, int rows, const E* b, int keys, const KeysValues<E>& kv, E* turned, E* woven,
                  float* to) const {
    const int width = heads().width;
    transpose_rows(a, std::ptrdiff_t(kv.score_width()), rows, keys, turned);
    for (int column = 0; column < width; column += kPanel)
      add_product(Rows<E>{turned, depth_of<E>(rows)}, keys,
                  panel_of_rows(b + column, std::ptrdiff_t(inner()), rows, std::min(kPanel, width - column), woven),
                  kv.zeros, to + column, width);
  }

  // P * (grad P - sum of P * grad P), rows of `columns`; columns past the keys have no probability. That sum is divided
  // by the sum of P, which is not quite one: what all scores have in common gets no gradient, whatever P was rounded
  // to.
  static void softmax_gradient(const E* probabilities, const float* gradient, int rows, int columns, E* out) {
    for (int r = 0; r < rows; ++r, probabilities += columns, gradient += columns, out += columns) {
      Vec along{}, all{};
      for (int c = 0; c < columns; c += kLanes) {
        const Vec p = load(probabilities + c);
        along += p * load(gradient + c);
        all += p;
      }
      const float mean = sum_of_lanes(along) / sum_of_lanes(all);
      for (int c = 0; c < columns; c += kLanes) store(out + c, load(probabilities + c) * (load(gradient + c) - mean));
    }
  }

  // Of q and the projection.
  void matrix_gradients(const Call& call, float* const* grads) const {
    const int c = channels();
    if (float* to = grads[kQ]) {
      call.over_tokens.transpose(call.normed, call.transposed);
      call.over_tokens.run(
          call.transposed, call.grad_queries, inner(), 0, call.kv.zeros, call.matrix_sums,
          [&](int panel, int columns, const float* found) { store_inputs(found, panel, columns, 1, to); });
    }
    if (float* to = grads[kProj]) {
      call.over_tokens.transpose(call.grad, call.transposed);
      call.over_tokens.run(
          call.transposed, call.values, inner(), 0, call.kv.zeros, call.matrix_sums,
          [&](int panel, int columns, const float* found) {
            store_panel(found, c, columns, [&](int j) { return heads().torch_row(panel * kPanel + j, 1); }, c, to);
          });
    }
    if (float* to = grads[kQBias]) {
      fold_parts(call.query_biases, call.map.batch * call.parts, inner(), inner());
      for (int n = 0; n < int(inner()); ++n)
        if (heads().torch_row(n, 1) >= 0) to[heads().torch_row(n, 1)] = call.query_biases[n];
    }
  }

  // A panel of the transposed gradient of q or kv, as torch has it.
  void store_inputs(const float* found, int panel, int columns, int parts, float* to) const {
    for (int j = 0; j < columns; ++j) {
      const std::ptrdiff_t row = heads().torch_row(panel * kPanel + j, parts);
      for (int c = 0; c < channels() && row >= 0; ++c) to[row * channels() + c] = found[c * kPanel + j];
    }
  }

  // The gradients of keys and values from all items' sums, and what they give.
  void gather_keys(const Call& call, float* const* grads) const {
    const int keys = call.kv.keys, width = heads().width, columns = 2 * int(inner());
    const std::size_t size = keys_size(call);
    constexpr float kLn2 = 0.69314718055994531f;  // queries carry log2(e)
    const Split split = split_light(call.map.batch, keys, std::int64_t{columns} * call.parts);
    parallel_for(call.map.batch * split.tiles, [&](std::int64_t item) {
      const auto tile = split.tile(item);
      const float* from = call.grad_keys_parts + tile.image * call.parts * size;
      for (int key = tile.begin; key < tile.end; ++key)
        for (int part = 0; part < columns / width; ++part) {
          const float* row = from + (std::size_t(part) * keys + key) * width;
          E* to = call.grad_keys + (tile.image * keys + key) * columns + part * width;
          for (int i = 0; i < width; i += kLanes) {
            Vec total{};
            for (std::int64_t p = 0; p < call.parts; ++p) total += load(row + p * size + i);
            store(to + i, total * (part % 2 == 0 ? kLn2 : 1.0f));
          }
        }
    });
    if (float* to = grads[kKv]) {
      call.over_keys.transpose(source(call), call.transposed);
      call.over_keys.run(call.transposed, call.grad_keys, columns, 0, call.kv.zeros, call.matrix_sums,
                         [&](int panel, int count, const float* found) { store_inputs(found, panel, count, 2, to); });
    }
    if (float* to = grads[kKvBias]) {
      const auto [some, sums] = thread_scratch().take(array<float>(columns), array<float>(columns));
      sum_rows(call.grad_keys, columns, call.map.batch * keys, columns, some, sums);
      for (int n = 0; n < columns; ++n)
        if (heads().torch_row(n, 2) >= 0) to[heads().torch_row(n, 2)] = sums[n];
    }
    const bool reduces = inputs_.reduction.reduces();
    for_panels(call.map.batch, kv_back_, keys, 1, [&](int p, std::int64_t image, Split::Tile cut, int) {
      const std::ptrdiff_t row = image * keys + cut.begin;
      float* to = (reduces ? call.grad_reduced : call.grad_normed) + row * this->width();
      Epilogue<float> epilogue = store_rows(to, this->width(), call.kv.zeros);
      if (!reduces) epilogue.residual = to;
      gemm_panel(rows_of(call.grad_keys, row, columns), cut.rows(), kv_back_.panel(p), p * kPanel, epilogue);
    });
  }

  void finish_rows(const Call& call, T* grad_x, float* const* grads) const {
    const PatchOrder order(call.map, inputs_.reduction.ratio());
    const std::int64_t tokens = call.map.tokens();
    const auto place = [&](std::int64_t token) {
      const int within = int(token % tokens);
      return (token - within + order.place(within / call.map.width, within % call.map.width)) * width();
    };
    call.rows.run(
        inputs_.norm, [&](std::int64_t token) { return call.x + token * channels(); },
        [&](std::int64_t token) { return call.grad_normed + place(token); },
        add_residual(call.grad_out, grad_x, channels()), [&](std::int64_t token) { return call.grad + place(token); },
        call.row_sums, {grads[kNormWeight], grads[kNormBias], grads[kProjBias]});
  }

  AttentionInputs<T, E> inputs_;
  float scale_;  // of the scores
  PackedMatrix<E> q_back_, kv_back_, proj_back_;
  ReductionGradients<T, E> reduction_;
};
