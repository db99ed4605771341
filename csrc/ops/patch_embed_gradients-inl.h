// Gradients of the patch embed: LayerNorm of a convolution's tokens, see patch_embed-inl.h.
// Compiled once per ISA: included by isa/kernels-inl.h, which says how.
//
// The patches of the whole batch are gathered again, as rows. The image's gradient is summed by bands of its rows: what
// patches of neighbouring bands share is computed for both, so that each pixel is one item's.

template <class T, class E>
class PatchEmbedGradientsOp final : public PatchEmbedGradients {
 public:
  PatchEmbedGradientsOp(const PatchEmbedWeights& w, bool channels_last)
      : in_channels_(w.in_channels),
        channels_(w.channels),
        kernel_(w.kernel),
        stride_(w.stride),
        channels_last_(channels_last),
        patches_(w.in_channels, w.kernel, w.stride, channels_last),
        rows_{w.in_channels, w.kernel, channels_last, w.in_channels},
        proj_(pack_conv<E, T>(w.proj, w.channels, rows_)),
        back_(pack_conv_backward<E, T>(w.proj, w.channels, rows_)),
        norm_(w.norm, w.channels) {}

  int in_channels() const override { return in_channels_; }
  int channels() const override { return channels_; }
  Map map(const Image& image) const override { return patches_.map(image); }
  bool accepts(const Image& image) const override { return patches_.accepts(image); }
  std::vector<std::size_t> sizes() const override {
    const std::size_t c = channels_;
    return {c * kernel_ * kernel_ * in_channels_, c, c, c};
  }

  void run(const Image& image, const void* grad_out, void* grad_image, float* const* grads) const override {
    const Map map = this->map(image);
    const std::int64_t tokens = map.tokens(), all = map.batch * tokens;
    const MatrixGradient<E> matrix(1, all, width(), patches_.width());
    const NormGradients<E> rows(all, width());
    std::ptrdiff_t* offsets;
    E *patches, *gradient, *transposed;
    float *projected, *matrix_sums, *row_sums, *zeros;
    const std::size_t zeros_size = std::max<std::size_t>(patches_.width(), width());
    std::tie(offsets, patches, gradient, transposed, projected, matrix_sums, row_sums, zeros) = shared_scratch().take(
        array<std::ptrdiff_t>(patches_.pieces()), array<E>(row_room(all) * patches_.width()),
        array<E>(row_room(all) * width()), array<E>(matrix.transposed_size()), array<float>(all * width()),
        array<float>(matrix.sums_size()), array<float>(rows.sums_size()), array<float>(zeros_size));
    std::memset(zeros, 0, zeros_size * sizeof(float));
    patches_.piece_offsets(image, offsets);
    const Split split = split_rows(map.batch, tokens, kMinRows, 96, kRowStep);
    parallel_for(map.batch * split.tiles, [&](std::int64_t item) {
      const MatrixUnit unit;
      const auto tile = split.tile(item);
      const std::int64_t row = tile.image * tokens + tile.begin;
      E* from = patches + row * patches_.width();
      patches_.gather(image, offsets, tile, from);
      gemm(rows_of(from, 0, patches_.width()), tile.rows(), proj_,
           store_rows(projected + row * width(), width(), proj_.bias.data()));
    });
    std::fill(gradient, gradient + all * width(), E{});
    const T* grad = static_cast<const T*>(grad_out);
    const auto to = [&](std::int64_t row) { return gradient + row * width(); };
    rows.run(
        norm_, [&](std::int64_t row) { return projected + row * width(); },
        [&](std::int64_t row) { return grad + row * channels_; },
        [&](std::int64_t row, int c, int count, Vec value) PVT_LAMBDA { store_columns(to(row) + c, value, count); }, to,
        row_sums, {grads[kNormWeight], grads[kNormBias], grads[kBias]});
    if (float* weight = grads[kWeight]) {
      matrix.transpose(gradient, transposed);
      matrix.run(transposed, patches, patches_.width(), 0, zeros, matrix_sums,
                 [&](int panel, int columns, const float* found) {
                   rows_.store_gradient(found, channels_, panel, columns, weight);
                 });
    }
    if (grad_image) scatter(image, map, gradient, zeros, static_cast<T*>(grad_image));
  }

 private:
  enum Gradient { kWeight, kBias, kNormWeight, kNormBias };

  std::size_t width() const { return row_width(channels_); }

  // The image's gradient, dense: (batch, height, width, in_channels) if channels are last, else (batch, in_channels,
  // height, width).
  void scatter(const Image& image, const Map& map, const E* gradient, const float* zeros, T* out) const {
    const int height = int(image.height), columns = int(image.width), pad = kernel_ / 2;
    const std::int64_t wanted = (gradient_items() + map.batch - 1) / std::max<std::int64_t>(map.batch, 1);
    const int bands = int(std::clamp<std::int64_t>(wanted, 1, std::max(1, height / (4 * stride_))));
    const std::size_t row = std::size_t(columns) * in_channels_;
    constexpr int kPatches = 48;  // worked on together
    parallel_for(map.batch * bands, [&](std::int64_t item) {
      const MatrixUnit unit;
      const std::int64_t index = item / bands;
      const int begin = int(item % bands * height / bands), end = int((item % bands + 1) * height / bands);
      const auto [sums, rows] =
          thread_scratch().take(array<float>((end - begin) * row), array<float>(kPatches * patches_.width()));
      std::memset(sums, 0, (end - begin) * row * sizeof(float));
      // patch row i covers image rows from i * stride - pad on
      const int first = std::max(0, (begin + pad - kernel_) / stride_),
                last = std::min(map.height, (end - 1 + pad) / stride_ + 1);
      for (int i = first; i < last; ++i)
        for (int c = 0; c < map.width; c += kPatches) {
          const int count = std::min(kPatches, map.width - c);
          const std::int64_t token = (index * map.height + i) * map.width + c;
          gemm(rows_of(gradient, token, width()), count, back_, store_rows(rows, patches_.width(), zeros));
          for (int p = 0; p < count; ++p)
            add_patch(rows + p * patches_.width(), i * stride_ - pad, (c + p) * stride_ - pad, begin, end, columns,
                      sums);
        }
      store_band(sums, index, begin, end, height, columns, out);
    });
  }

  // Adds a patch whose upper left corner is (y0, x0) to rows [begin, end) of the image's gradient, which lie as in
  // `out` within each row.
  void add_patch(const float* patch, int y0, int x0, int begin, int end, int columns, float* sums) const {
    const int left = std::max(0, -x0), right = std::min(kernel_, columns - x0);
    const std::size_t row = std::size_t(columns) * in_channels_;
    for (int dy = 0; dy < kernel_; ++dy) {
      const int y = y0 + dy;
      if (y < begin || y >= end) continue;
      const float* from = patch + dy * kernel_ * in_channels_;
      float* to = sums + (y - begin) * row;
      if (channels_last_) {
        add(from + left * in_channels_, to + (x0 + left) * in_channels_, (right - left) * in_channels_);
      } else {
        for (int c = 0; c < in_channels_; ++c)
          add(from + c * kernel_ + left, to + std::ptrdiff_t(c) * columns + x0 + left, right - left);
      }
    }
  }

  static void add(const float* from, float* to, int count) {
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(to + i) + load(from + i));
    for (; i < count; ++i) to[i] += from[i];
  }

  void store_band(const float* sums, std::int64_t index, int begin, int end, int height, int columns, T* out) const {
    const int pieces = channels_last_ ? 1 : in_channels_, length = channels_last_ ? columns * in_channels_ : columns;
    for (int y = begin; y < end; ++y)
      for (int c = 0; c < pieces; ++c, sums += length) {
        T* to = out + ((index * pieces + c) * height + y) * std::ptrdiff_t(length);
        int i = 0;
        for (; i + kLanes <= length; i += kLanes) store(to + i, load(sums + i));
        if (i < length) store_first(to + i, load_first(sums + i, length - i), length - i);
      }
  }

  int in_channels_, channels_, kernel_, stride_;
  bool channels_last_;
  Patches<T, E> patches_;
  PatchRows rows_;
  PackedMatrix<E> proj_, back_;
  PackedNorm norm_;
};
