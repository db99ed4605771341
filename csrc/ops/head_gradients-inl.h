// Gradients of LayerNorm alone, and of the head: the mean over tokens, then the classifier.
// Compiled once per ISA: included by isa/kernels-inl.h, which says how.

template <class T>
class LayerNormGradientsOp final : public LayerNormGradients {
 public:
  LayerNormGradientsOp(const Norm& norm, int channels) : norm_(norm, channels) {}

  int channels() const override { return norm_.channels; }
  std::vector<std::size_t> sizes() const override { return {std::size_t(channels()), std::size_t(channels())}; }

  void run(const void* x, std::int64_t rows, const void* grad_out, void* grad_x, float* const* grads) const override {
    const NormGradients<float> over(rows, row_width(channels()));
    float* sums = std::get<0>(shared_scratch().take(array<float>(over.sums_size())));
    const auto of = [&](const void* all) {
      return [this, all](std::int64_t row) { return static_cast<const T*>(all) + row * channels(); };
    };
    over.run(
        norm_, of(x), of(grad_out),
        [&](std::int64_t row, int c, int count, Vec value) PVT_LAMBDA {
          if (grad_x) store_columns(static_cast<T*>(grad_x) + row * channels() + c, value, count);
        },
        [](std::int64_t) { return static_cast<const float*>(nullptr); }, sums, {grads[0], grads[1], nullptr});
  }

 private:
  PackedNorm norm_;
};

template <class T, class E>
class HeadGradientsOp final : public HeadGradients {
 public:
  HeadGradientsOp(const Linear& classifier, int channels, int classes)
      : channels_(channels), classes_(classifier.weight == nullptr ? 0 : classes) {
    if (classes_) back_ = pack_backward<E, T>(classifier, classes, channels);
  }

  int channels() const override { return channels_; }
  int classes() const override { return classes_ ? classes_ : channels_; }
  std::vector<std::size_t> sizes() const override { return {std::size_t(classes_) * channels_, std::size_t(classes_)}; }

  void run(const void* x, std::int64_t batch, std::int64_t tokens, const void* grad_out, void* grad_x,
           float* const* grads) const override {
    const std::size_t wide = row_width(channels_), tall = row_width(classes());
    const MatrixGradient<E> matrix(1, batch, tall, wide);
    const auto [means, gradient, transposed, sums, grad_means, zeros] = shared_scratch().take(
        array<E>(row_room(batch) * wide), array<E>(row_room(batch) * tall), array<E>(matrix.transposed_size()),
        array<float>(matrix.sums_size()), array<float>(batch * wide), array<float>(std::max(wide, tall)));
    std::memset(zeros, 0, std::max(wide, tall) * sizeof(float));
    const T* grad = static_cast<const T*>(grad_out);
    scale_rows(grad, int(batch), classes(), 1, gradient, tall);
    if (classes_) {
      const MatrixUnit unit;
      gemm(rows_of(gradient, 0, tall), int(batch), back_, store_rows(grad_means, wide, zeros));
    } else {
      scale_rows(grad, int(batch), channels_, 1, grad_means, wide);
    }
    if (float* to = classes_ ? grads[0] : nullptr) {
      parallel_for(batch, [&, means = means](std::int64_t b) {
        mean_of_tokens(static_cast<const T*>(x) + b * tokens * channels_, tokens, channels_, means + b * wide, wide);
      });
      matrix.transpose(gradient, transposed);
      matrix.run(transposed, means, wide, 0, zeros, sums, [&](int panel, int columns, const float* found) {
        for (int j = 0; j < columns && panel * kPanel + j < channels_; ++j)
          for (int n = 0; n < classes_; ++n)
            to[std::ptrdiff_t(n) * channels_ + panel * kPanel + j] = found[n * kPanel + j];
      });
    }
    if (float* to = classes_ ? grads[1] : nullptr)
      for (int n = 0; n < classes_; ++n) {
        to[n] = 0;
        for (std::int64_t b = 0; b < batch; ++b) to[n] += to_float(grad[b * classes_ + n]);
      }
    if (grad_x == nullptr) return;
    const float share = 1.0f / tokens;
    const Split split = split_light(batch, tokens, channels_);
    parallel_for(batch * split.tiles, [&, grad_means = grad_means](std::int64_t item) {
      const auto tile = split.tile(item);
      const float* from = grad_means + tile.image * wide;
      for (int t = tile.begin; t < tile.end; ++t)
        for (int c = 0; c < channels_; c += kLanes)
          store_columns(static_cast<T*>(grad_x) + (tile.image * tokens + t) * channels_ + c, load(from + c) * share,
                        std::min(kLanes, channels_ - c));
    });
  }

 private:
  int channels_, classes_;
  PackedMatrix<E> back_;
};
