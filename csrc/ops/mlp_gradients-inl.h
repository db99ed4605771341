// Gradients of the MLP op: out = x + scale * fc2(gelu(c)), c = dwconv3x3(h), h = [relu] fc1(LayerNorm(x)).
// Compiled once per ISA: included by isa/kernels-inl.h, which says how.
//
// Nothing hidden-sized is kept from the forward, or made here beyond what a thread's cache holds. For a block of hidden
// panels and a band of image rows: fc1 again, convolution and GELU with its slope, then the gradients of c, of the
// taps, of h, of both matrices, and the block's share of the gradient of fc1's input: five products, all of them
// panels'. A thread walks down the bands of a chunk of the batch with one block of panels after another. Two rows of h
// and of the gradient of c go from band to band, so that none is computed twice but where a chunk begins within an
// image.
//
// Items are pairs of a group of blocks and a chunk. What they sum up, matrices' gradients per chunk and fc1's input's
// per group, is added up at the end; how many of each there are is a matter of what that costs.

template <class T, class E>
class MlpGradientsOp final : public ResidualGradients {
 public:
  explicit MlpGradientsOp(const MlpWeights& w)
      : channels_(w.channels),
        hidden_(w.hidden),
        relu_(w.relu),
        norm_(w.norm, w.channels),
        fc1_(pack_linear<E, T>(w.fc1, w.hidden, w.channels)),
        fc1_back_(pack_backward<E, T>(w.fc1, w.hidden, w.channels)),
        fc2_back_(pack_backward<E, T>(w.fc2, w.channels, w.hidden)),
        taps_(pack_taps<T>(w.dwconv, w.hidden, fc1_.panels())) {}

  int channels() const override { return channels_; }
  int min_side() const override { return 1; }
  std::vector<std::size_t> sizes() const override {
    const std::size_t c = channels_, h = hidden_;
    return {c, c, h * c, h, h * 9, h, h * c, c};
  }

  void run(const void* x, Map map, const void* residual_scale, const void* grad_out, void* grad_x,
           float* const* grads) const override {
    Call call{static_cast<const T*>(x), static_cast<const T*>(grad_out), static_cast<const T*>(residual_scale), map,
              Plan(*this, map)};
    take_buffers(call);
    make_operands(call);
    parallel_for(call.plan.groups * call.plan.chunks,
                 [&](std::int64_t item) { Walk(*this, call, item / call.plan.chunks, item % call.plan.chunks).run(); });
    sum_weights(call, grads);
    finish_rows(call, static_cast<T*>(grad_x), grads);
  }

 private:
  static constexpr bool kPrecise = std::is_same_v<T, float> && std::is_same_v<E, float>;
  static constexpr int kMostPanels = 8;    // of a block
  static constexpr int kSums = kTaps + 1;  // a panel's gradients of taps, of the convolution's bias, of fc1's bias
  enum Gradient { kNormWeight, kNormBias, kFc1, kFc1Bias, kDwconv, kDwconvBias, kFc2, kFc2Bias };

  std::size_t width() const { return row_width(channels_); }

  // How a call is cut up: by its shape, and for very many threads by their number.
  struct Plan {
    Plan(const MlpGradientsOp& op, const Map& map) {
      const int row = map.width, panels = op.fc1_.panels();
      // rows of a band: a panel's h, its gradient and operands take a quarter of the cache; two at least, as two are
      // carried
      const std::size_t row_bytes = std::size_t(row + 2) * kPanel * (2 * sizeof(float) + 2 * sizeof(E));
      const int rows = int(std::max<std::size_t>(2, std::min<std::size_t>(l2_bytes() / 4 / row_bytes, map.height)));
      bands = std::max(1, map.height / rows);
      // panels of a block: their matrices, gradients and carried rows take half of the cache
      // panels of a block: their buffers take about the cache; two at least, so that an operand serves both
      const std::size_t padded = (most_rows(map) + 3) * padded_row(row) * sizeof(float);
      const std::size_t dense = most_rows(map) * row * kPanel * sizeof(E);
      block = std::min(panels, int(std::clamp<std::size_t>(l2_bytes() / (2 * padded + 2 * dense), 2, kMostPanels)));
      blocks = (panels + block - 1) / block;
      block = (panels + blocks - 1) / blocks;
      blocks = (panels + block - 1) / block;
      choose(op, map);
    }

    // Groups of blocks and chunks of bands: at least gradient_items() items where there are as many, at the least cost.
    // Each group writes a map of sums, each chunk all matrices'; a chunk that begins within an image computes rows
    // again. A float that is written and read costs about as much as kTraffic multiply-adds.
    void choose(const MlpGradientsOp& op, const Map& map) {
      constexpr double kTraffic = 32;
      const double matrices = 2.0 * op.hidden_ * op.channels_, tokens = double(map.batch) * map.tokens();
      const std::int64_t all = std::max<std::int64_t>(map.batch * bands, 1);
      const std::int64_t wanted =
          std::min<std::int64_t>(gradient_items(), 1 + std::int64_t(5 * tokens * matrices / 4e6));
      double least = 0;
      for (int g = 1; g <= blocks; ++g) {
        const std::int64_t c = std::min(all, (wanted + g - 1) / g);
        std::int64_t within = 0;
        for (std::int64_t i = 0; i < c; ++i) within += (i * all / c) % bands != 0;
        const double idle = g * c < wanted ? double(wanted) / double(g * c) : 1;
        const double work = 2.5 * tokens * matrices + 1.5 * within * map.width * matrices;
        const double cost = idle * work + kTraffic * (2 * g * tokens * op.channels_ + 2 * c * matrices);
        if (groups == 0 || cost < least) least = cost, groups = g, chunks = c;
      }
    }

    int bands;          // of an image
    int block, blocks;  // panels of a block, blocks
    std::int64_t groups = 0, chunks = 0;

    // First row of an image's band.
    int row(const Map& map, int band) const { return band * map.height / bands; }
    int most_rows(const Map& map) const { return (map.height + bands - 1) / bands + 1; }
  };

  struct Call {
    const T *x, *grad_out, *residual_scale;
    Map map;
    Plan plan;
    E *normed = nullptr, *grad = nullptr;              // (tokens, width): LayerNorm(x), scale * grad_out
    E *normed_bands = nullptr, *grad_bands = nullptr;  // of each band the transposed of both
    float* grad_normed = nullptr;                      // (groups, tokens, width)
    float* matrices = nullptr;                         // (chunks, panels, 2, width, kPanel): of fc1 and fc2, transposed
    float* sums = nullptr;                             // (chunks, panels, kSums, kPanel)
    float* rows = nullptr;                             // for NormGradients
    float* zeros = nullptr;

    std::int64_t tokens() const { return map.batch * map.tokens(); }
    float scale(std::int64_t image) const { return residual_scale ? to_float(residual_scale[image]) : 1.0f; }
    std::size_t band_size(std::size_t width) const {
      return row_room(width) * depth_of<E>(plan.most_rows(map) * map.width);
    }
  };

  // A band's rows: those whose c is computed with it, and those whose h gets its gradient.
  struct Band {
    Band(const Call& call, std::int64_t band)
        : image(band / call.plan.bands), index(int(band % call.plan.bands)), height(call.map.height) {
      begin = call.plan.row(call.map, index), end = call.plan.row(call.map, index + 1);
      inner_begin = begin == 0 ? 0 : begin + 1, inner_end = std::min(end + 1, height);
    }
    std::int64_t image;
    int index, height, begin, end, inner_begin, inner_end;
  };

  void take_buffers(Call& call) const {
    const std::size_t tokens = row_room(call.tokens()), bands = call.map.batch * call.plan.bands;
    const std::size_t panels = fc1_.panels(), chunks = call.plan.chunks;
    std::tie(call.normed, call.grad, call.normed_bands, call.grad_bands, call.grad_normed, call.matrices, call.sums,
             call.rows, call.zeros) =
        shared_scratch().take(
            array<E>(tokens * width()), array<E>(tokens * width()), array<E>(bands * call.band_size(width())),
            array<E>(bands * call.band_size(width())), array<float>(call.plan.groups * call.tokens() * width()),
            array<float>(chunks * panels * 2 * width() * kPanel), array<float>(chunks * panels * kSums * kPanel),
            array<float>(NormGradients<E>(call.tokens(), width()).sums_size()),
            array<float>(std::max<std::size_t>(width(), kPanel)));
    std::memset(call.zeros, 0, std::max<std::size_t>(width(), kPanel) * sizeof(float));
  }

  void make_operands(const Call& call) const {
    const int row = call.map.width;
    const std::int64_t bands = call.map.batch * call.plan.bands;
    parallel_for(bands, [&](std::int64_t item) {
      const Band band(call, item);
      const std::int64_t first = (band.image * call.map.height + band.begin) * row;
      const int count = (band.end - band.begin) * row;
      norm_rows<Activation::none>(norm_, call.x + first * channels_, channels_, count, call.normed + first * width(),
                                  int(width()));
      scale_rows(call.grad_out + first * channels_, count, channels_, call.scale(band.image),
                 call.grad + first * width(), width());
    });
    parallel_for(bands, [&](std::int64_t item) {
      const Band band(call, item);
      const std::int64_t image = band.image * call.map.height;
      transpose_rows(call.normed + (image + band.begin) * row * width(), width(), (band.end - band.begin) * row,
                     int(width()), call.normed_bands + item * call.band_size(width()));
      transpose_rows(call.grad + (image + band.inner_begin) * row * width(), width(),
                     (band.inner_end - band.inner_begin) * row, int(width()),
                     call.grad_bands + item * call.band_size(width()));
    });
  }

  // One item.
  class Walk {
   public:
    Walk(const MlpGradientsOp& op, const Call& call, std::int64_t group, std::int64_t chunk)
        : op_(op), call_(call), group_(group), chunk_(chunk), width_(call.map.width), row_(padded_row(width_)) {
      const Plan& plan = call.plan;
      const std::int64_t all = call.map.batch * plan.bands;
      first_band_ = chunk * all / plan.chunks, last_band_ = (chunk + 1) * all / plan.chunks;
      first_block_ = int(group * plan.blocks / plan.groups), last_block_ = int((group + 1) * plan.blocks / plan.groups);
      rows_ = plan.most_rows(call.map) + 3;
      tokens_ = plan.most_rows(call.map) * width_;
      const std::size_t padded = std::size_t(plan.block) * rows_ * row_, dense = plan.block * tokens_size();
      std::tie(hidden_, grad_, gelu_, grad_hidden_, woven_, places_) = thread_scratch().take(
          array<float>(padded), array<float>(padded), array<E>(dense), array<E>(dense),
          array<E>(std::is_same_v<E, float> ? 0 : plan.block * panel_room<E>(tokens_)), array<int>(rows_ * width_));
      for (std::size_t row = 0; row < padded; row += row_)
        for (float* rows : {hidden_ + row, grad_ + row}) {
          std::memset(rows, 0, kPanel * sizeof(float));
          std::memset(rows + row_ - kPanel, 0, kPanel * sizeof(float));
        }
      for (int y = 0; y < rows_; ++y)
        for (int c = 0; c < width_; ++c) places_[y * width_ + c] = y * (width_ + 2) + c + 1;
    }

    void run() {
      const MatrixUnit unit;
      const int panels = op_.fc1_.panels();
      std::memset(matrix(first_block_ * call_.plan.block, 0), 0, matrices_of_group() * sizeof(float));
      for (int block = first_block_; block < last_block_; ++block) {
        begin_ = block * call_.plan.block, end_ = std::min(begin_ + call_.plan.block, panels);
        for (std::int64_t band = first_band_; band < last_band_; ++band) run_band(band);
      }
    }

   private:
    std::size_t matrices_of_group() const {
      const int panels = op_.fc1_.panels(), block = call_.plan.block;
      return std::size_t(std::min(last_block_ * block, panels) - first_block_ * block) * 2 * op_.width() * kPanel;
    }
    float* matrix(int panel, int which) const {
      return call_.matrices + ((chunk_ * op_.fc1_.panels() + panel) * 2 + which) * op_.width() * kPanel;
    }
    float* sums(int panel) const { return call_.sums + (chunk_ * op_.fc1_.panels() + panel) * kSums * kPanel; }
    // Of a panel of the block: rows of h and of the gradient of c, the activated ones, and the gradient of h.
    float* hidden(int panel) const { return hidden_ + std::size_t(panel - begin_) * rows_ * row_; }
    float* grad(int panel) const { return grad_ + std::size_t(panel - begin_) * rows_ * row_; }
    std::size_t tokens_size() const { return row_room(tokens_) * kPanel; }
    E* gelu(int panel) const { return gelu_ + (panel - begin_) * tokens_size(); }
    E* grad_hidden(int panel) const { return grad_hidden_ + (panel - begin_) * tokens_size(); }

    template <class Body>
    void for_block(const Body& body) const {
      for (int p = begin_; p < end_; ++p) body(p);
    }

    void run_band(std::int64_t index) {
      const Band band(call_, index);
      if (index == first_band_) for_block([&](int p) { std::memset(sums(p), 0, kSums * kPanel * sizeof(float)); });
      if (band.begin == 0)
        for_block([&](int p) { std::memset(grad(p), 0, 2 * row_ * sizeof(float)); });
      else if (index == first_band_)  // what the chunk before has computed
        warm_up(band);
      multiply(band.image, band.inner_begin, band.inner_end, band.begin == 0 ? 0 : band.inner_begin + 1);
      const int inner = (band.inner_end - band.inner_begin) * width_, outer = (band.end - band.begin) * width_;
      for_block([&](int p) { activate(p, band.inner_end - band.inner_begin, sums(p)); });
      add_to_matrices(call_.grad_bands, index, gelu_, inner, 1);
      for_block([&](int p) { gradient_of_hidden(p, band, grad_hidden(p)); });
      add_to_matrices(call_.normed_bands, index, grad_hidden_, outer, 0);
      for_block([&](int p) { carry(p, band.inner_end - band.inner_begin); });
      add_to_input(band);
    }

    // Of a chunk that begins at a row within an image: two rows of h and of the gradient of c above it.
    void warm_up(const Band& band) {
      const int above = band.begin - 1;
      float other[kTaps * kPanel];  // those rows are summed in the chunk before
      multiply(band.image, above, band.begin + 1, std::max(above - 1, 0));
      for_block([&](int p) {
        activate(p, 2, other);
        carry(p, 2);
      });
    }

    // The last two rows of h and of the gradient of c, after `rows` of c, are what the next ones begin with.
    void carry(int p, int rows) {
      for (float* from : {hidden(p), grad(p)}) std::memmove(from, from + rows * row_, 2 * row_ * sizeof(float));
    }

    // For rows [begin, end) of c, row y of which is row y - begin + 2 of grad, while hidden has row begin - 1 in front:
    // h, from row `from` on as those above were carried, and the gradient of c without its slope.
    void multiply(std::int64_t image, int begin, int end, int from) {
      const int last = std::min(end + 1, call_.map.height), new_rows = (last - from) * width_;
      const std::size_t row_bytes = row_ * sizeof(float);
      const std::int64_t top = image * call_.map.height;
      if (begin == 0) for_block([&](int p) { std::memset(hidden(p), 0, row_bytes); });
      if (end == call_.map.height)
        for_block([&](int p) { std::memset(hidden(p) + (end - begin + 1) * row_, 0, row_bytes); });
      for_rows_and_panels<E>(new_rows, op_.width(), begin_, end_, [&](int first, int count, int p) {
        float* to = hidden(p) + (from - (begin - 1)) * row_;
        Epilogue<float> epilogue = store_rows(to, kPanel, op_.fc1_.bias.data() + p * kPanel);
        epilogue.places = places_ + first, epilogue.columns = op_.fc1_.layout.width(p), epilogue.relu = op_.relu_;
        gemm_panel(rows_of(call_.normed, (top + from) * width_ + first, op_.width()), count, op_.fc1_.panel(p), 0,
                   epilogue);
      });
      for_rows_and_panels<E>((end - begin) * width_, op_.width(), begin_, end_, [&](int first, int count, int p) {
        Epilogue<float> epilogue = store_rows(grad(p) + 2 * row_, kPanel, call_.zeros);
        epilogue.places = places_ + first, epilogue.columns = op_.fc1_.layout.width(p);
        gemm_panel(rows_of(call_.grad, (top + begin) * width_ + first, op_.width()), count, op_.fc2_back_.panel(p), 0,
                   epilogue);
      });
    }

    // matrix(panel, which) += the transposed rows of a band times the block's panels of `tokens` rows.
    void add_to_matrices(E* bands, std::int64_t band, const E* rows, int tokens, int which) {
      E* transposed = bands + band * call_.band_size(op_.width());
      Panel<E> panels[kMostPanels];
      for_block([&](int p) {
        const int i = p - begin_;
        panels[i] =
            panel_of_rows(rows + i * tokens_size(), kPanel, tokens, kPanel, woven_ + i * panel_room<E>(tokens_));
      });
      const int depth = depth_of<E>(tokens);
      for_rows_and_panels<E>(int(op_.width()), depth, begin_, end_, [&](int first, int count, int p) {
        add_product(Rows<E>{transposed + std::ptrdiff_t(first) * depth, depth}, count, panels[p - begin_], call_.zeros,
                    matrix(p, which) + first * kPanel);
      });
    }

    // After `multiply`, for `rows` rows of c: c, GELU, and the gradients of c and of the taps.
    void activate(int p, int rows, float* tap_sums) {
      const float* hidden = this->hidden(p);
      float* grad = this->grad(p);
      const int columns = op_.fc1_.layout.width(p);
      const float* panel = op_.taps_.data() + std::size_t(p) * kTaps * kPanel;
      for (int part = 0; part < columns; part += kLanes) {
        Vec taps[9];
        for (int i = 0; i < 9; ++i) taps[i] = load(panel + i * kPanel + part);
        const Vec bias = load(panel + 9 * kPanel + part);
        for (int y = 0; y < rows; ++y) {
          const float* above[3] = {hidden + y * row_ + part, hidden + (y + 1) * row_ + part,
                                   hidden + (y + 2) * row_ + part};
          float* gradient = grad + (y + 2) * row_ + kPanel + part;
          E* value = gelu(p) + std::ptrdiff_t(y) * width_ * kPanel + part;
          convolve_row(above, width_, taps, bias, [&](int c, Vec sum) PVT_LAMBDA {
            Vec slope;
            store(value + c * kPanel, gelu_and_slope<kPrecise>(sum, slope));
            store(gradient + c * kPanel, load(gradient + c * kPanel) * slope);
          });
          add_taps(above, gradient, tap_sums + part);
        }
      }
    }

    // One row's part of the gradients of the taps and of the convolution's bias.
    void add_taps(const float* const (&above)[3], const float* gradient, float* to) const {
      Vec acc[kTaps] = {};
      for (int c = 0; c < width_; ++c) {
        const Vec g = load(gradient + c * kPanel);
#pragma GCC unroll 9
        for (int i = 0; i < 9; ++i) acc[i] += g * load(above[i / 3] + (c + i % 3) * kPanel);
        acc[9] += g;
      }
      for (int i = 0; i < kTaps; ++i) store(to + i * kPanel, load(to + i * kPanel) + acc[i]);
    }

    // The gradient of h for the band's own rows: the convolution's taps turned round, and ReLU's mask.
    void gradient_of_hidden(int p, const Band& band, E* to) {
      const int columns = op_.fc1_.layout.width(p), rows = band.end - band.begin;
      // the gradient begins with the row above the band, h with that above the first row of c
      float* gradient = grad(p) + (band.begin == 0 ? row_ : 0);
      if (band.end == band.height) std::memset(gradient + (rows + 1) * row_, 0, row_ * sizeof(float));
      const float* hidden = this->hidden(p) + (band.begin - (band.inner_begin - 1)) * row_;
      const float* panel = op_.taps_.data() + std::size_t(p) * kTaps * kPanel;
      float* sum = sums(p) + kTaps * kPanel;
      for (int part = 0; part < columns; part += kLanes) {
        Vec taps[9];
        for (int i = 0; i < 9; ++i) taps[i] = load(panel + (8 - i) * kPanel + part);
        for (int y = 0; y < rows; ++y) {
          const float* above[3] = {gradient + y * row_ + part, gradient + (y + 1) * row_ + part,
                                   gradient + (y + 2) * row_ + part};
          const float* h = hidden + y * row_ + kPanel + part;
          E* row = to + std::ptrdiff_t(y) * width_ * kPanel + part;
          Vec total{};
          const bool relu = op_.relu_;
          convolve_row(above, width_, taps, Vec{}, [&](int c, Vec value) PVT_LAMBDA {
            if (relu) value = load(h + c * kPanel) > 0.0f ? value : Vec{};
            store(row + c * kPanel, value);
            total += value;
          });
          store(sum + part, load(sum + part) + total);
        }
      }
    }

    // The block's share of the gradient of fc1's input.
    void add_to_input(const Band& band) {
      const int rows = (band.end - band.begin) * width_;
      const std::int64_t first = (band.image * call_.map.height + band.begin) * width_;
      const Rows<E> a{grad_hidden_, kPanel, kPanel, std::ptrdiff_t(tokens_size())};
      float* to = call_.grad_normed + (group_ * call_.tokens() + first) * op_.width();
      Epilogue<float> epilogue = store_rows(to, op_.width(), call_.zeros);
      if (begin_ != first_block_ * call_.plan.block) epilogue.residual = to;
      const int from = begin_ * kPanel, end = std::min(end_ * kPanel, op_.fc1_back_.layout.depth);
      for (int q = 0; q < op_.fc1_back_.panels(); ++q)
        gemm_panel(a, rows, op_.fc1_back_.panel(q).part(from, end), q * kPanel, epilogue);
    }

    const MlpGradientsOp& op_;
    const Call& call_;
    const std::int64_t group_, chunk_;
    const int width_;
    const std::size_t row_;  // floats of a padded row
    std::int64_t first_band_, last_band_;
    int first_block_, last_block_, begin_ = 0, end_ = 0, rows_, tokens_;
    // Of the panels of a block: padded rows of h and of the gradient of c; GELU(c) and the gradient of h, dense.
    float *hidden_, *grad_;
    E *gelu_, *grad_hidden_;
    E* woven_;     // for panel_of_rows
    int* places_;  // of a map's tokens in padded rows
  };

  void sum_weights(const Call& call, float* const* grads) const {
    const std::size_t panels = fc1_.panels(), size = width() * kPanel;
    parallel_for(std::int64_t(panels), [&](std::int64_t p) {
      const int columns = std::min(kPanel, hidden_ - int(p) * kPanel);
      const auto folded = [&](float* of_chunk, std::size_t panel_size, std::size_t count) {
        fold_parts(of_chunk, call.plan.chunks, panels * panel_size, count);
        return of_chunk;
      };
      if (float* fc1 = grads[kFc1]) {
        const float* total = folded(call.matrices + 2 * p * size, 2 * size, size);
        for (int j = 0; j < columns; ++j)
          for (int c = 0; c < channels_; ++c) fc1[(p * kPanel + j) * channels_ + c] = total[c * kPanel + j];
      }
      if (float* fc2 = grads[kFc2]) {
        const float* total = folded(call.matrices + (2 * p + 1) * size, 2 * size, size);
        for (int c = 0; c < channels_; ++c)
          std::memcpy(fc2 + std::ptrdiff_t(c) * hidden_ + p * kPanel, total + c * kPanel, columns * sizeof(float));
      }
      const float* total = folded(call.sums + p * kSums * kPanel, kSums * kPanel, kSums * kPanel);
      for (int j = 0; j < columns; ++j) {
        const std::ptrdiff_t channel = p * kPanel + j;
        for (int i = 0; i < 9 && grads[kDwconv]; ++i) grads[kDwconv][channel * 9 + i] = total[i * kPanel + j];
        if (grads[kDwconvBias]) grads[kDwconvBias][channel] = total[9 * kPanel + j];
        if (grads[kFc1Bias]) grads[kFc1Bias][channel] = total[10 * kPanel + j];
      }
    });
  }

  void finish_rows(const Call& call, T* grad_x, float* const* grads) const {
    const std::size_t size = width(), map = call.tokens() * size;
    const auto normed = [&](std::int64_t token) {
      float* total = call.grad_normed + token * size;
      fold_parts(total, call.plan.groups, map, size);
      return total;
    };
    const auto scaled = [&](std::int64_t token) { return call.grad + token * size; };
    NormGradients<E>(call.tokens(), size)
        .run(norm_, [&](std::int64_t token) { return call.x + token * channels_; }, normed,
             add_residual(call.grad_out, grad_x, channels_), scaled, call.rows,
             {grads[kNormWeight], grads[kNormBias], grads[kFc2Bias]});
  }

  int channels_, hidden_;
  bool relu_;
  PackedNorm norm_;
  PackedMatrix<E> fc1_, fc1_back_, fc2_back_;  // the last two for gradients of inputs: torch's matrices as they lie
  Buffer<float> taps_;
};
