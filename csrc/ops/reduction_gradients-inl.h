// Gradients of the spatial reduction, see spatial_reduction-inl.h.
// Compiled once per ISA: included by isa/kernels-inl.h, which says how.

template <class T, class E>
class ReductionGradients {
 public:
  ReductionGradients(const AttentionWeights& w, const SpatialReduction<T, E>& reduction) : channels_(w.channels) {
    if (reduction.reduces()) conv_back_ = pack_conv_backward<E, T>(w.sr, channels_, reduction.patch_rows());
  }

  // What a call wants, and its sizes.
  struct Buffers {
    float* sums = nullptr;    // (keys of all images, width) of the convolution, and of its parts
    E* pooled = nullptr;      // (keys, width), in the linear form
    E* reduced = nullptr;     // (keys, width)
    E* gradient = nullptr;    // (keys, width) of the convolution's output
    E* transposed = nullptr;  // of that
    float *matrix_sums = nullptr, *row_sums = nullptr;
  };
  struct Sizes {
    std::size_t sums, pooled, reduced, gradient, transposed, matrix_sums, row_sums;
  };
  Sizes sizes(const SpatialReduction<T, E>& reduction, const Map& map) const {
    if (!reduction.reduces()) return {};
    const std::size_t rows = map.batch * reduction.keys(map), size = reduction.reduced_size(rows);
    const MatrixGradient<E> gradient = matrix(reduction, map);
    return {reduction.sums_size(rows), reduction.linear() ? size : 0, size, size, gradient.transposed_size(),
            gradient.sums_size(),      over_rows(rows).sums_size()};
  }

  // From `grad_reduced` to what is added to `grad_normed`, tokens in PatchOrder; grads: of the convolution's weight and
  // bias, of the norm's weight and bias.
  void run(const SpatialReduction<T, E>& reduction, const Map& map, const Buffers& at, const E* normed,
           const float* zeros, float* grad_reduced, float* grad_normed, float* const* grads) const {
    const int keys = reduction.keys(map);
    const std::int64_t rows = map.batch * keys;
    norm_gradients(reduction, rows, at, grad_reduced, grads);
    if (float* to = grads[0]) {
      const MatrixGradient<E> gradient = matrix(reduction, map);
      gradient.transpose(at.gradient, at.transposed);
      const auto store = [&](int panel, int columns, const float* found) {
        reduction.patch_rows().store_gradient(found, channels_, panel, columns, to);
      };
      if (reduction.linear())
        gradient.run(at.transposed, at.pooled, width(), keys * width(), zeros, at.matrix_sums, store);
      else
        gradient.run(at.transposed, normed, reduction.patch_width(), map.tokens() * width(), zeros, at.matrix_sums,
                     store);
    }
    if (reduction.linear()) {
      convolve_back(at.gradient, map.batch, keys, zeros, grad_reduced, keys * width(), false);
      reduction.unpool(map, grad_reduced, grad_normed);
    } else {
      convolve_back(at.gradient, map.batch, keys, zeros, grad_normed, map.tokens() * width(), true);
    }
  }

 private:
  std::size_t width() const { return row_width(channels_); }
  NormGradients<E> over_rows(std::int64_t rows) const { return {rows, width()}; }
  MatrixGradient<E> matrix(const SpatialReduction<T, E>& reduction, const Map& map) const {
    return {map.batch, reduction.keys(map), width(), reduction.patch_width()};
  }

  // Through GELU, where there is one, and the norm: the gradient of the convolution's output.
  void norm_gradients(const SpatialReduction<T, E>& reduction, std::int64_t rows, const Buffers& at,
                      float* grad_reduced, float* const* grads) const {
    const PackedNorm& norm = reduction.norm();
    if (reduction.linear())
      parallel_for(rows, [&](std::int64_t row) {
        float* normed = std::get<0>(thread_scratch().take(array<float>(width())));
        norm_rows<Activation::none>(norm, at.sums + row * width(), width(), 1, normed, int(width()));
        float* gradient = grad_reduced + row * width();
        for (std::size_t c = 0; c < width(); c += kLanes) {
          Vec slope;
          gelu_and_slope<std::is_same_v<E, float>>(load(normed + c), slope);
          store(gradient + c, load(gradient + c) * slope);
        }
      });
    std::fill(at.gradient, at.gradient + rows * width(), E{});
    const auto to = [&](std::int64_t row) { return at.gradient + row * width(); };
    over_rows(rows).run(
        norm, [&](std::int64_t row) { return at.sums + row * width(); },
        [&](std::int64_t row) { return grad_reduced + row * width(); },
        [&](std::int64_t row, int c, int count, Vec value) PVT_LAMBDA { store_columns(to(row) + c, value, count); }, to,
        at.row_sums, {grads[2], grads[3], grads[1]});
  }

  // to (images, keys, patch) = or += gradient * conv; images of `to` are `image_size` apart.
  void convolve_back(const E* gradient, std::int64_t images, int keys, const float* zeros, float* to,
                     std::size_t image_size, bool add) const {
    const std::size_t patch = conv_back_.layout.columns;
    for_panels(images, conv_back_, keys, 1, [&](int p, std::int64_t image, Split::Tile cut, int) {
      float* out = to + image * image_size + cut.begin * patch;
      Epilogue<float> epilogue = store_rows(out, patch, zeros);
      if (add) epilogue.residual = out;
      gemm_panel(rows_of(gradient, image * keys + cut.begin, width()), cut.rows(), conv_back_.panel(p), p * kPanel,
                 epilogue);
    });
  }

  int channels_;
  PackedMatrix<E> conv_back_;
};
