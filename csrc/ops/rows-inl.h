// Work on rows of channels: LayerNorm, softmax.
// Compiled once per ISA: included by isa/kernels-inl.h, which says how.

// LayerNorm's weight and bias in float, padded to whole panels with zeros, so that padded columns become zero.
struct PackedNorm {
  int channels = 0;
  float eps = 0;
  Buffer<float> weight, bias;

  PackedNorm() = default;
  PackedNorm(const Norm& norm, int count)
      : channels(count), eps(norm.eps), weight(row_width(count)), bias(row_width(count)) {
    for (int c = 0; c < count; ++c) {
      weight[c] = norm.weight[c];
      bias[c] = norm.bias[c];
    }
  }
};

// Adds to `count` sums, whole vectors, those of the other parts in order, each `stride` further.
inline void fold_parts(float* sums, std::int64_t parts, std::size_t stride, std::size_t count) {
  for (std::int64_t part = 1; part < parts; ++part)
    for (std::size_t i = 0; i < count; i += kLanes) store(sums + i, load(sums + i) + load(sums + part * stride + i));
}

// exact_gelu: by the standard library's erf, element by element, for few rows whose errors are all queries'.
enum class Activation { none, gelu, exact_gelu };

// Combines of `reduce`.
constexpr auto sum = [](Vec a, Vec b) PVT_LAMBDA { return a + b; };
constexpr auto highest = [](Vec a, Vec b) PVT_LAMBDA { return max(a, b); };

// out = activation(LayerNorm(x)) for rows that are handed over one by one and done in groups. Writes `columns` columns
// (at most row_width(channels); those past the channels are zero). Two passes over a row, which the first leaves in
// cache: mean, then squared distances from it, so that a large mean costs no precision. The mean is summed from the
// row's first value on: of equal values it is that value, whatever their sum would round or overflow to.
template <class In, class Out, Activation kActivation = Activation::none>
class NormRows {
 public:
  NormRows(const PackedNorm& norm, int columns) : norm_(norm), columns_(columns) {}
  NormRows(const NormRows&) = delete;
  NormRows& operator=(const NormRows&) = delete;
  ~NormRows() { flush(); }

  PVT_INLINE void add(const In* x, Out* out) {
    x_[count_] = x;
    out_[count_] = out;
    if (++count_ == kRowGroup) flush();
  }

 private:
  void flush() {
    if (count_ == 0) return;
    for (int i = count_; i < kRowGroup; ++i) x_[i] = x_[count_ - 1], out_[i] = out_[count_ - 1];
    count_ = 0;
    const bool dense = norm_.channels == columns_;
    if (kLanes == 16 && dense && columns_ == 2 * kLanes)
      normalise_short<2>();
    else if (kLanes == 16 && dense && columns_ == 4 * kLanes)
      normalise_short<4>();
    else
      normalise();
  }

  // Rows of kVectors vectors, each read once and kept in registers.
  template <int kVectors>
  void normalise_short() {
    Vec x[kRowGroup][kVectors], all[kRowGroup] = {};
    float mean[kRowGroup], scale[kRowGroup];
    for_each(x, [&](auto i, auto j) PVT_LAMBDA { all[i] += x[i][j] = load(x_[i] + j * kLanes) - to_float(x_[i][0]); });
    means(all, mean);
    unrolled<kRowGroup>([&](auto i) PVT_LAMBDA { all[i] = Vec{}; });
    for_each(x, [&](auto i, auto j) PVT_LAMBDA {
      x[i][j] -= mean[i];
      all[i] += x[i][j] * x[i][j];
    });
    means(all, scale);
    inverse_deviations(scale);
    for_each(x,
             [&](auto i, auto j) PVT_LAMBDA { store(out_[i] + j * kLanes, finished(x[i][j] * scale[i], j * kLanes)); });
  }

  void normalise() {
    const int full = norm_.channels / kLanes * kLanes, rest = norm_.channels - full;
    Vec all[kRowGroup], tails[kRowGroup] = {};
    float mean[kRowGroup], scale[kRowGroup];
    const auto of_rows = [](const auto& body) PVT_LAMBDA { unrolled<kRowGroup>(body); };
    if (rest) of_rows([&](auto i) PVT_LAMBDA { tails[i] = load_first(x_[i] + full, rest); });
    const Vec inside = first_lanes(rest);
    of_rows([&](auto i) PVT_LAMBDA { all[i] = (tails[i] - to_float(x_[i][0])) * inside; });
    for (int c = 0; c < full; c += kLanes)
      of_rows([&](auto i) PVT_LAMBDA { all[i] += load(x_[i] + c) - to_float(x_[i][0]); });
    means(all, mean);
    for (int i = 0; i < kRowGroup; ++i) mean[i] += to_float(x_[i][0]);
    of_rows([&](auto i) PVT_LAMBDA {
      tails[i] = (tails[i] - mean[i]) * inside;
      all[i] = tails[i] * tails[i];
    });
    for (int c = 0; c < full; c += kLanes)
      of_rows([&](auto i) PVT_LAMBDA {
        const Vec d = load(x_[i] + c) - mean[i];
        all[i] += d * d;
      });
    means(all, scale);
    inverse_deviations(scale);
    for (int c = 0; c < full; c += kLanes)
      of_rows([&](auto i) PVT_LAMBDA { store(out_[i] + c, finished((load(x_[i] + c) - mean[i]) * scale[i], c)); });
    if (rest)
      of_rows([&](auto i) PVT_LAMBDA {
        const Vec v = finished(tails[i] * scale[i], full);
        columns_ - full < kLanes ? store_first(out_[i] + full, v, rest) : store(out_[i] + full, v);
      });
    for (int c = int(round_up(norm_.channels, kLanes)); c + kLanes <= columns_; c += kLanes)
      of_rows([&](auto i) PVT_LAMBDA { store(out_[i] + c, Vec{}); });
  }

  // Of the lanes of each row's sums.
  PVT_INLINE void means(const Vec (&sums)[kRowGroup], float (&mean)[kRowGroup]) const {
    const float share = 1.0f / norm_.channels;
    float lanes[kLanes];
    store(lanes, reduce(sums, sum));
    for (int i = 0; i < kRowGroup; ++i) mean[i] = lanes[i] * share;
  }

  // Of variances. Of one that overflowed NaN, as torch's: the inverse alone would be 0, and the row its bias.
  PVT_INLINE void inverse_deviations(float (&variance)[kRowGroup]) const {
    for (float& v : variance) v = 1.0f / std::sqrt(v + norm_.eps) + v * 0.0f;
  }

  // Of normalised values of columns from c on.
  PVT_INLINE Vec finished(Vec v, int c) const {
    v = v * load(norm_.weight.data() + c) + load(norm_.bias.data() + c);
    if constexpr (kActivation == Activation::gelu) v = gelu<std::is_same_v<Out, float>>(v);
    if constexpr (kActivation == Activation::exact_gelu) v = exact_gelu(v);
    return v;
  }

  const PackedNorm& norm_;
  const int columns_;
  int count_ = 0;
  const In* x_[kRowGroup];
  Out* out_[kRowGroup];
};

// The same for `count` rows, `ld` apart, into dense rows of `columns`.
template <Activation kActivation, class In, class Out>
void norm_rows(const PackedNorm& norm, const In* x, std::size_t ld, int count, Out* out, int columns) {
  NormRows<In, Out, kActivation> rows(norm, columns);
  for (std::ptrdiff_t r = 0; r < count; ++r) rows.add(x + r * ld, out + r * columns);
}

// probabilities = 2^(scores - max) / sum over the first `count` scores of each of kRows rows, zero from there to
// `width`, which is the distance of rows; `scores` are used up and may be `probabilities` themselves.
template <int kRows, class Out>
void softmax_group(float* scores, int count, int width, Out* probabilities) {
  constexpr bool kPrecise = std::is_same_v<Out, float>;
  const int full = count / kLanes * kLanes, rest = count - full, used = int(round_up(count, kLanes));
  const auto of_rows = [&](const auto& body) PVT_LAMBDA {
    unrolled<kRows>([&](auto i) PVT_LAMBDA { body(i, scores + i * width, probabilities + i * width); });
  };
  // lanes past the keys never win the maximum, and weigh nothing
  const Vec valid = first_lanes(rest);
  Vec all[kRowGroup];
  const auto combined = [&](const auto& combine, float (&lanes)[kLanes]) PVT_LAMBDA {
    for (int i = kRows; i < kRowGroup; ++i) all[i] = all[0];
    store(lanes, reduce(all, combine));
  };
  of_rows([&](auto i, float* from, Out*) PVT_LAMBDA { all[i] = splat(from[0]); });
  for (int j = 0; j < full; j += kLanes)
    of_rows([&](auto i, float* from, Out*) PVT_LAMBDA { all[i] = max(all[i], load(from + j)); });
  if (rest)
    of_rows([&](auto i, float* from, Out*)
                PVT_LAMBDA { all[i] = max(all[i], valid > 0.0f ? load(from + full) : splat(from[0])); });
  float top[kLanes], total[kLanes];
  combined(highest, top);
  of_rows([&](auto i, float*, Out*) PVT_LAMBDA { all[i] = Vec{}; });
  for (int j = 0; j < full; j += kLanes)
    of_rows([&](auto i, float* from, Out*) PVT_LAMBDA {
      const Vec e = exp2_nonpositive<kPrecise>(load(from + j) - top[i]);
      store(from + j, e);
      all[i] += e;
    });
  if (rest)
    of_rows([&](auto i, float* from, Out*) PVT_LAMBDA {
      const Vec e = exp2_nonpositive<kPrecise>(min(Vec{}, load(from + full) - top[i])) * valid;
      store(from + full, e);
      all[i] += e;
    });
  combined(sum, total);
  of_rows([&](auto i, float* from, Out* to) PVT_LAMBDA {
    const float share = 1.0f / total[i];
    for (int j = 0; j < used; j += kLanes) store(to + j, load(from + j) * share);
    for (int j = used; j < width; j += kLanes) store(to + j, Vec{});
  });
}

template <class Out>
void softmax_rows(float* scores, int rows, int count, int width, Out* probabilities) {
  const std::ptrdiff_t ld = width;
  int row = 0;
  for (; row + kRowGroup <= rows; row += kRowGroup)
    softmax_group<kRowGroup>(scores + row * ld, count, width, probabilities + row * ld);
  for (; row < rows; ++row) softmax_group<1>(scores + row * ld, count, width, probabilities + row * ld);
}

template <class T>
class LayerNormOp final : public LayerNorm {
 public:
  LayerNormOp(const Norm& norm, int channels) : norm_(norm, channels) {}

  int channels() const override { return norm_.channels; }

  void run(const void* x, std::int64_t rows, void* out) const override {
    const Split split = split_light(1, rows, norm_.channels);
    parallel_for(split.tiles, [&](std::int64_t item) {
      const auto tile = split.tile(item);
      const std::ptrdiff_t at = std::ptrdiff_t(tile.begin) * norm_.channels;
      norm_rows<Activation::none>(norm_, static_cast<const T*>(x) + at, norm_.channels, tile.rows(),
                                  static_cast<T*>(out) + at, norm_.channels);
    });
  }

 private:
  PackedNorm norm_;
};
