// Work on rows of channels: LayerNorm, softmax.

// LayerNorm's weight and bias in float, padded to whole panels with zeros, so that padded columns become zero.
struct PackedNorm {
  int channels = 0;
  float eps = 0;
  Buffer<float> weight, bias;

  PackedNorm() = default;
  template <class T>
  PackedNorm(const Norm& norm, int count, const T*)
      : channels(count), eps(norm.eps), weight(row_width(count)), bias(row_width(count)) {
    for (int c = 0; c < count; ++c) {
      weight[c] = to_float(static_cast<const T*>(norm.weight)[c]);
      bias[c] = to_float(static_cast<const T*>(norm.bias)[c]);
    }
  }
};

enum class Activation { none, gelu };

// out = activation(LayerNorm(x)) for one row; writes `columns` columns (at most row_width(channels); those past the
// channels are zero). Two passes over the row, which the first leaves in cache: mean, then squared distances from it,
// so that a large mean costs no precision.
template <Activation kActivation = Activation::none, class In, class Out>
void layer_norm_row(const In* x, const PackedNorm& norm, Out* out, int columns) {
  const int full = norm.channels / kLanes * kLanes, rest = norm.channels - full;
  Vec total{}, squares{};
  for (int c = 0; c < full; c += kLanes) total += load(x + c);
  const Vec tail = rest ? load_first(x + full, rest) : Vec{};
  const float mean = sum(total + tail) / norm.channels;
  for (int c = 0; c < full; c += kLanes) {
    const Vec d = load(x + c) - mean;
    squares += d * d;
  }
  if (rest) {
    const Vec d = (tail - mean) * first_lanes(rest);
    squares += d * d;
  }
  const float scale = 1.0f / std::sqrt(sum(squares) / norm.channels + norm.eps);
  auto finish = [&](int c, Vec v) __attribute__((always_inline)) {
    v = (v - mean) * scale * load(norm.weight.data() + c) + load(norm.bias.data() + c);
    if constexpr (kActivation == Activation::gelu) v = gelu<std::is_same_v<Out, float>>(v);
    return v;
  };
  for (int c = 0; c < full; c += kLanes) store(out + c, finish(c, load(x + c)));
  if (rest) {
    const Vec v = finish(full, tail);
    columns - full < kLanes ? store_first(out + full, v, rest) : store(out + full, v);
  }
  for (int c = int(round_up(norm.channels, kLanes)); c + kLanes <= columns; c += kLanes) store(out + c, Vec{});
}

// probabilities = 2^(scores - max) / sum over the first `count` scores, zero from there to `width`; `scores` is used up
// and may be `probabilities` itself.
template <class Out>
void softmax_row(float* scores, int count, int width, Out* probabilities) {
  const int full = count / kLanes * kLanes, rest = count - full;
  // lanes past the keys never win the maximum, and weigh nothing
  const Vec valid = first_lanes(rest);
  Vec top = splat(scores[0]);
  for (int j = 0; j < full; j += kLanes) top = max(top, load(scores + j));
  if (rest) top = max(top, valid > 0.0f ? load(scores + full) : splat(scores[0]));
  const float highest = reduce(top, [](Vec a, Vec b) __attribute__((always_inline)) { return max(a, b); });
  Vec total{};
  for (int j = 0; j < full; j += kLanes) {
    const Vec e = exp2_nonpositive(load(scores + j) - highest);
    store(scores + j, e);
    total += e;
  }
  if (rest) {
    const Vec e = exp2_nonpositive(min(Vec{}, load(scores + full) - highest)) * valid;
    store(scores + full, e);
    total += e;
  }
  const float inverse = 1.0f / sum(total);
  const int used = int(round_up(count, kLanes));
  for (int j = 0; j < used; j += kLanes) store(probabilities + j, load(scores + j) * inverse);
  for (int j = used; j < width; j += kLanes) store(probabilities + j, Vec{});
}
