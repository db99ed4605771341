// Drawn calls of every op and of its gradients.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "guarded.h"
#include "kernels.h"
#include "plain_loops.h"

inline const char* name_of(pvt::DType dtype) {
  return dtype == pvt::DType::f32 ? "f32" : dtype == pvt::DType::bf16 ? "bf16" : "mixed";
}

// Values as the kernels see them: float, or the bf16 nearest to it, in dense storage flush against a guard page.
class Tensor {
 public:
  // All NaN, so that what is never written shows.
  Tensor(std::size_t size, pvt::DType dtype, Flush flush)
      : size_(size), dtype_(dtype), memory_(std::make_shared<Guarded>(bytes(), flush)) {
    for (std::size_t i = 0; i < size; ++i) set(i, NAN);
  }
  Tensor(std::size_t size, pvt::DType dtype, Flush flush, double mean, double deviation, std::mt19937& random)
      : Tensor(size, dtype, flush) {
    std::normal_distribution<double> normal(mean, deviation);
    for (std::size_t i = 0; i < size; ++i) set(i, float(normal(random)));
  }

  void seal() { memory_->seal(); }  // against writes
  void* data() const { return memory_->data(); }
  const float* floats() const { return static_cast<const float*>(data()); }
  std::size_t size() const { return size_; }
  std::size_t bytes() const { return size_ * (dtype_ == pvt::DType::bf16 ? 2 : 4); }

  double operator[](std::size_t i) const {
    std::uint32_t bits = 0;
    if (dtype_ != pvt::DType::bf16)
      std::memcpy(&bits, static_cast<const char*>(data()) + 4 * i, 4);
    else
      std::memcpy(reinterpret_cast<char*>(&bits) + kUpper, static_cast<const char*>(data()) + 2 * i, 2);
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  void set(std::size_t i, float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (dtype_ == pvt::DType::bf16) bits += 0x8000;
    if (dtype_ != pvt::DType::bf16)
      std::memcpy(static_cast<char*>(data()) + 4 * i, &bits, 4);
    else
      std::memcpy(static_cast<char*>(data()) + 2 * i, reinterpret_cast<char*>(&bits) + kUpper, 2);
  }

 private:
  static constexpr int kUpper = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? 2 : 0;
  std::size_t size_;
  pvt::DType dtype_;
  std::shared_ptr<Guarded> memory_;
};

// One call of a packed op on drawn arguments, which it keeps.
struct Call {
  std::string name;
  std::size_t out_size;  // elements
  std::function<void(void* out)> run;
  std::function<Values()> expected;
};

// One call of an op's gradients on drawn arguments, which it keeps.
struct GradientCall {
  using Forward = std::function<Values(const Values& x, const std::vector<Values>& weights)>;
  std::string name;
  std::vector<std::size_t> sizes;  // of the weights' gradients
  std::size_t x_size;
  std::function<void(void* grad_x, float* const* grads)> run;
  Forward forward;  // the op by plain loops
  Values x;         // as grad_x lies
  std::vector<Values> weights;
  Values grad_out;
};

// Draws calls of one ISA's ops in one element type, every operand flush against a guard page.
class Cases {
 public:
  Cases(const std::string& isa, pvt::DType dtype, Flush flush)
      : factories_(pvt::factories(isa, dtype)), dtype_(dtype), flush_(flush) {}

  Tensor out(const Call& call) const { return Tensor(call.out_size, dtype_, flush_); }

  Call mlp(const MlpShape& s) {
    const auto drawn = mlp_arguments(s);
    const std::shared_ptr<pvt::ResidualOp> op = factories_.mlp(mlp_weights(s, drawn.weights));
    return {"mlp " + size(s.batch, s.height, s.width, s.channels), drawn.x.size(),
            [=](void* out) { op->run(drawn.x.data(), {s.batch, s.height, s.width}, drawn.scale_data(s.scaled), out); },
            [=] { return ::mlp(s, values(drawn.x), values(drawn.weights), values(drawn.scale)); }};
  }

  GradientCall mlp_gradients(const MlpShape& s) {
    const auto drawn = mlp_arguments(s);
    const std::shared_ptr<pvt::ResidualGradients> op = factories_.mlp_gradients(mlp_weights(s, drawn.weights));
    return residual_gradients(
        "mlp " + size(s.batch, s.height, s.width, s.channels), op, {s.batch, s.height, s.width}, drawn, s.scaled,
        [=](const Values& x, const std::vector<Values>& w) { return ::mlp(s, x, w, values(drawn.scale)); });
  }

  Call attention(const AttentionShape& s) {
    const auto drawn = attention_arguments(s);
    const std::shared_ptr<pvt::ResidualOp> op = factories_.attention(attention_weights(s, drawn.weights));
    return {"attention " + size(s.batch, s.height, s.width, s.channels), drawn.x.size(),
            [=](void* out) { op->run(drawn.x.data(), {s.batch, s.height, s.width}, drawn.scale_data(s.scaled), out); },
            [=] { return ::attention(s, values(drawn.x), values(drawn.weights), values(drawn.scale)); }};
  }

  GradientCall attention_gradients(const AttentionShape& s) {
    const auto drawn = attention_arguments(s);
    const std::shared_ptr<pvt::ResidualGradients> op =
        factories_.attention_gradients(attention_weights(s, drawn.weights));
    return residual_gradients(
        "attention " + size(s.batch, s.height, s.width, s.channels), op, {s.batch, s.height, s.width}, drawn, s.scaled,
        [=](const Values& x, const std::vector<Values>& w) { return ::attention(s, x, w, values(drawn.scale)); });
  }

  Call patch_embed(const EmbedShape& s) {
    const auto drawn = embed_arguments(s);
    const std::shared_ptr<pvt::PatchEmbed> op =
        factories_.patch_embed(embed_weights(s, drawn.weights), s.channels_last);
    return {"patch_embed " + size(s.batch, s.height, s.width, s.in), embedded_size(s),
            [=](void* out) { op->run(view(s, drawn.x), out); },
            [=] { return ::patch_embed(s, pixels(s, values(drawn.x)), values(drawn.weights)); }};
  }

  GradientCall patch_embed_gradients(const EmbedShape& s) {
    const auto drawn = embed_arguments(s);
    const std::shared_ptr<pvt::PatchEmbedGradients> op =
        factories_.patch_embed_gradients(embed_weights(s, drawn.weights), s.channels_last);
    const Tensor grad_out = draw(embedded_size(s));
    const EmbedShape dense{s.batch, s.height, s.width, s.in, s.channels, s.kernel, s.stride, s.channels_last};
    return {"patch_embed " + size(s.batch, s.height, s.width, s.in),
            op->sizes(),
            std::size_t(s.batch) * s.height * s.width * s.in,
            [=](void* grad_x, float* const* grads) { op->run(view(s, drawn.x), grad_out.data(), grad_x, grads); },
            [=](const Values& x, const std::vector<Values>& w) { return ::patch_embed(s, pixels(dense, x), w); },
            packed(s, values(drawn.x)),
            values(drawn.weights),
            values(grad_out)};
  }

  Call norm(const RowsShape& s) {
    const auto drawn = norm_arguments(s);
    const std::shared_ptr<pvt::LayerNorm> op =
        factories_.layer_norm({drawn.weights[0].floats(), drawn.weights[1].floats(), 1e-6f}, s.channels);
    return {"layer_norm " + size(s.batch, s.tokens, 1, s.channels), drawn.x.size(),
            [=](void* out) { op->run(drawn.x.data(), std::int64_t(s.batch) * s.tokens, out); },
            [=] { return normed(s, values(drawn.x), values(drawn.weights)); }};
  }

  GradientCall norm_gradients(const RowsShape& s) {
    const auto drawn = norm_arguments(s);
    const std::shared_ptr<pvt::LayerNormGradients> op =
        factories_.layer_norm_gradients({drawn.weights[0].floats(), drawn.weights[1].floats(), 1e-6f}, s.channels);
    const Tensor grad_out = draw(drawn.x.size());
    return {"layer_norm " + size(s.batch, s.tokens, 1, s.channels),
            op->sizes(),
            drawn.x.size(),
            [=](void* grad_x, float* const* grads) {
              op->run(drawn.x.data(), std::int64_t(s.batch) * s.tokens, grad_out.data(), grad_x, grads);
            },
            [=](const Values& x, const std::vector<Values>& w) { return normed(s, x, w); },
            values(drawn.x),
            values(drawn.weights),
            values(grad_out)};
  }

  Call head(const RowsShape& s) {
    const auto drawn = head_arguments(s);
    const std::shared_ptr<pvt::Head> op = factories_.head(classifier(s, drawn.weights), s.channels, s.classes);
    return {"head " + size(s.batch, s.tokens, 1, s.channels), outputs(s),
            [=](void* out) { op->run(drawn.x.data(), s.batch, s.tokens, out); },
            [=] { return ::head(s, values(drawn.x), values(drawn.weights)); }};
  }

  GradientCall head_gradients(const RowsShape& s) {
    const auto drawn = head_arguments(s);
    const std::shared_ptr<pvt::HeadGradients> op =
        factories_.head_gradients(classifier(s, drawn.weights), s.channels, s.classes);
    const Tensor grad_out = draw(outputs(s));
    return {"head " + size(s.batch, s.tokens, 1, s.channels),
            op->sizes(),
            drawn.x.size(),
            [=](void* grad_x, float* const* grads) {
              op->run(drawn.x.data(), s.batch, s.tokens, grad_out.data(), grad_x, grads);
            },
            [=](const Values& x, const std::vector<Values>& w) { return ::head(s, x, w); },
            values(drawn.x),
            values(drawn.weights),
            values(grad_out)};
  }

 private:
  // Weights in the order of the contract; one of no elements is absent.
  struct Arguments {
    Tensor x, scale;
    std::vector<Tensor> weights;
    const void* scale_data(bool scaled) const { return scaled ? scale.data() : nullptr; }
  };
  static Values values(const Tensor& tensor) {
    Values all(tensor.size());
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = tensor[i];
    return all;
  }
  static std::vector<Values> values(const std::vector<Tensor>& tensors) {
    std::vector<Values> all;
    for (const Tensor& tensor : tensors) all.push_back(values(tensor));
    return all;
  }
  static const float* bias(const Tensor& tensor) { return tensor.size() ? tensor.floats() : nullptr; }

  Arguments mlp_arguments(const MlpShape& s) {
    const std::size_t c = s.channels, h = s.hidden, b = s.bias ? 1 : 0;
    return {draw(std::size_t(s.batch) * s.height * s.width * c, 1, 0.5),
            draw(s.batch),
            {draw_floats(c, 0.2, 1), draw_floats(c, 0.2), draw(h * c, std::pow(c, -0.5)), draw_floats(b * h, 0.5),
             draw(h * 9, 0.33), draw_floats(b * h, 0.5), draw(h * c, std::pow(h, -0.5)), draw_floats(b * c, 0.5)}};
  }
  static pvt::MlpWeights mlp_weights(const MlpShape& s, const std::vector<Tensor>& w) {
    return {{w[0].floats(), w[1].floats(), 1e-6f},
            {w[2].data(), bias(w[3])},
            {w[4].data(), bias(w[5])},
            {w[6].data(), bias(w[7])},
            s.channels,
            s.hidden,
            s.relu};
  }

  Arguments attention_arguments(const AttentionShape& s) {
    const std::size_t c = s.channels, kernel = s.linear ? 1 : s.sr, r = s.linear || s.sr > 1 ? 1 : 0,
                      b = s.bias ? 1 : 0;
    const double spread = std::pow(c, -0.5);
    return {draw(std::size_t(s.batch) * s.height * s.width * c, 1, 0.5),
            draw(s.batch),
            {draw_floats(c, 0.2, 1), draw_floats(c, 0.2), draw(c * c, spread), draw_floats(b * c, 0.5),
             draw(2 * c * c, spread), draw_floats(b * 2 * c, 0.5), draw(r * c * c * kernel * kernel, spread / kernel),
             draw_floats(r * b * c, 0.5), draw_floats(r * c, 0.2, 1), draw_floats(r * c, 0.2), draw(c * c, spread),
             draw_floats(b * c, 0.5)}};
  }
  static pvt::AttentionWeights attention_weights(const AttentionShape& s, const std::vector<Tensor>& t) {
    pvt::AttentionWeights w{};
    w.norm = {t[0].floats(), t[1].floats(), 1e-6f};
    w.q = {t[2].data(), bias(t[3])}, w.kv = {t[4].data(), bias(t[5])}, w.proj = {t[10].data(), bias(t[11])};
    if (t[6].size()) w.sr = {t[6].data(), bias(t[7])}, w.sr_norm = {t[8].floats(), t[9].floats(), 1e-5f};
    w.channels = s.channels, w.heads = s.heads, w.sr_ratio = s.linear ? 1 : s.sr, w.linear = s.linear;
    w.scale = float(std::pow(s.channels / s.heads, -0.5));
    return w;
  }

  GradientCall residual_gradients(const std::string& name, const std::shared_ptr<pvt::ResidualGradients>& op,
                                  const pvt::Map& map, const Arguments& drawn, bool scaled,
                                  const GradientCall::Forward& forward) {
    const Tensor grad_out = draw(drawn.x.size());
    return {name,
            op->sizes(),
            drawn.x.size(),
            [=](void* grad_x, float* const* grads) {
              op->run(drawn.x.data(), map, drawn.scale_data(scaled), grad_out.data(), grad_x, grads);
            },
            forward,
            values(drawn.x),
            values(drawn.weights),
            values(grad_out)};
  }

  static std::size_t place(const EmbedShape& s, int b, int c, int y, int x) {
    const pvt::Image at = strides(s);
    return std::size_t(b * at.stride_batch + c * at.stride_channel + y * at.stride_row + x * at.stride_column);
  }
  static pvt::Image strides(const EmbedShape& s) {
    pvt::Image view{nullptr, s.batch, s.height, s.width, 0, 1, 0, s.in};
    view.stride_row = (s.width + s.gap) * view.stride_column;
    if (!s.channels_last) {
      view.stride_column = 1;
      view.stride_row = s.width + s.gap;
      view.stride_channel = s.height * view.stride_row + s.gap;
    }
    view.stride_batch = s.channels_last ? s.height * view.stride_row + s.gap : s.in * view.stride_channel;
    return view;
  }
  static pvt::Image view(const EmbedShape& s, const Tensor& image) {
    pvt::Image view = strides(s);
    view.data = image.data();
    return view;
  }
  template <class Body>
  static void for_pixels(const EmbedShape& s, const Body& body) {
    for (int b = 0; b < s.batch; ++b)
      for (int y = 0; y < s.height; ++y)
        for (int x = 0; x < s.width; ++x)
          for (int c = 0; c < s.in; ++c) body(b, c, y, x);
  }
  // Of an image as it lies in memory: dense, channels last.
  static Values pixels(const EmbedShape& s, const Values& image) {
    Values all;
    for_pixels(s, [&](int b, int c, int y, int x) { all.push_back(image[place(s, b, c, y, x)]); });
    return all;
  }
  // The same dense, channels last or not as it was.
  static Values packed(EmbedShape s, const Values& image) {
    EmbedShape dense = s;
    dense.gap = 0;
    Values all(std::size_t(s.batch) * s.height * s.width * s.in);
    for_pixels(s, [&](int b, int c, int y, int x) { all[place(dense, b, c, y, x)] = image[place(s, b, c, y, x)]; });
    return all;
  }
  Arguments embed_arguments(const EmbedShape& s) {
    const std::size_t c = s.channels;
    Tensor image(place(s, s.batch - 1, s.in - 1, s.height - 1, s.width - 1) + 1, dtype_, flush_);
    std::normal_distribution<double> normal(0.5, 1);
    for_pixels(s, [&](int b, int i, int y, int x) { image.set(place(s, b, i, y, x), float(normal(random_))); });
    image.seal();
    return {image,
            draw(0),
            {draw(c * s.in * s.kernel * s.kernel, 1.0 / (s.kernel * std::sqrt(s.in))), draw_floats(c, 0.5),
             draw_floats(c, 0.2, 1), draw_floats(c, 0.2)}};
  }
  static pvt::PatchEmbedWeights embed_weights(const EmbedShape& s, const std::vector<Tensor>& w) {
    return {{w[0].data(), w[1].floats()}, {w[2].floats(), w[3].floats(), 1e-5f}, s.in, s.channels, s.kernel, s.stride};
  }
  static std::size_t embedded_size(const EmbedShape& s) {
    const int pad = s.kernel / 2, rows = (s.height + 2 * pad - s.kernel) / s.stride + 1,
              columns = (s.width + 2 * pad - s.kernel) / s.stride + 1;
    return std::size_t(s.batch) * rows * columns * s.channels;
  }

  Arguments norm_arguments(const RowsShape& s) {
    return {draw(std::size_t(s.batch) * s.tokens * s.channels, 1, 3),
            draw(0),
            {draw_floats(s.channels, 0.2, 1), draw_floats(s.channels, 0.2)}};
  }
  static Values normed(const RowsShape& s, Values x, const std::vector<Values>& w) {
    layer_norm(x, s.channels, w[0], w[1], 1e-6);
    return x;
  }
  Arguments head_arguments(const RowsShape& s) {
    return {draw(std::size_t(s.batch) * s.tokens * s.channels, 1, 3),
            draw(0),
            {draw(std::size_t(s.classes) * s.channels, std::pow(s.channels, -0.5)), draw_floats(s.classes, 0.5)}};
  }
  static pvt::Linear classifier(const RowsShape& s, const std::vector<Tensor>& w) {
    return s.classes ? pvt::Linear{w[0].data(), w[1].floats()} : pvt::Linear{};
  }
  static std::size_t outputs(const RowsShape& s) { return std::size_t(s.batch) * (s.classes ? s.classes : s.channels); }

  Tensor draw(std::size_t size, double deviation = 1, double mean = 0) {
    return draw_as(dtype_, size, deviation, mean);
  }
  Tensor draw_floats(std::size_t size, double deviation = 1, double mean = 0) {
    return draw_as(pvt::DType::f32, size, deviation, mean);
  }
  Tensor draw_as(pvt::DType dtype, std::size_t size, double deviation, double mean) {
    Tensor drawn(size, dtype, flush_, mean, deviation, random_);
    drawn.seal();
    return drawn;
  }
  static std::string size(int batch, int height, int width, int channels) {
    return std::to_string(batch) + "x" + std::to_string(height) + "x" + std::to_string(width) + "x" +
           std::to_string(channels);
  }

  const pvt::Factories& factories_;
  pvt::DType dtype_;
  Flush flush_;
  std::mt19937 random_{7};
};
