// Calls of every op, and what they give by plain loops in double.
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

using Values = std::vector<double>;

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

inline double gelu(double x) { return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))); }

// rows of `channels`: LayerNorm, in place
inline void layer_norm(Values& x, int channels, const Tensor& weight, const Tensor& bias, double eps) {
  for (std::size_t at = 0; at < x.size(); at += channels) {
    double mean = 0, variance = 0;
    for (int c = 0; c < channels; ++c) mean += x[at + c] / channels;
    for (int c = 0; c < channels; ++c) variance += (x[at + c] - mean) * (x[at + c] - mean) / channels;
    for (int c = 0; c < channels; ++c) x[at + c] = (x[at + c] - mean) / std::sqrt(variance + eps) * weight[c] + bias[c];
  }
}

inline Values linear(const Values& x, int in, int out, const Tensor& weight, const Tensor* bias) {
  const std::size_t rows = x.size() / in;
  Values y(rows * out);
  for (std::size_t r = 0; r < rows; ++r)
    for (int n = 0; n < out; ++n) {
      double total = bias ? (*bias)[n] : 0;
      for (int k = 0; k < in; ++k) total += x[r * in + k] * weight[std::size_t(n) * in + k];
      y[r * out + n] = total;
    }
  return y;
}

// A convolution of one image [height][width][in] into [rows][columns][out], kernel k, padding `pad`.
inline Values convolve(const Values& x, int height, int width, int in, int out, int k, int stride, int pad,
                       const Tensor& weight, const Tensor* bias, bool depthwise) {
  const int rows = (height + 2 * pad - k) / stride + 1, columns = (width + 2 * pad - k) / stride + 1;
  const int per = depthwise ? 1 : in;
  Values y(std::size_t(rows) * columns * out);
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c)
      for (int n = 0; n < out; ++n) {
        double total = bias ? (*bias)[n] : 0;
        for (int dy = 0; dy < k; ++dy)
          for (int dx = 0; dx < k; ++dx) {
            const int row = r * stride - pad + dy, column = c * stride - pad + dx;
            if (row < 0 || row >= height || column < 0 || column >= width) continue;
            for (int i = 0; i < per; ++i)
              total += x[(std::size_t(row) * width + column) * in + (depthwise ? n : i)] *
                       weight[((std::size_t(n) * per + i) * k + dy) * k + dx];
          }
        y[(std::size_t(r) * columns + c) * out + n] = total;
      }
  return y;
}

inline Values pool7(const Values& x, int height, int width, int channels) {
  Values y(49 * channels);
  for (int r = 0; r < 7; ++r)
    for (int c = 0; c < 7; ++c) {
      const int y0 = r * height / 7, y1 = ((r + 1) * height + 6) / 7, x0 = c * width / 7,
                x1 = ((c + 1) * width + 6) / 7;
      for (int i = 0; i < channels; ++i) {
        double total = 0;
        for (int row = y0; row < y1; ++row)
          for (int column = x0; column < x1; ++column) total += x[(std::size_t(row) * width + column) * channels + i];
        y[(r * 7 + c) * channels + i] = total / ((y1 - y0) * (x1 - x0));
      }
    }
  return y;
}

// The attention's output before the projection.
inline Values attend(const Values& q, const Values& kv, int channels, int head, double scale) {
  const int tokens = int(q.size()) / channels, keys = int(kv.size()) / (2 * channels);
  Values z(q.size()), weight(keys);
  for (int t = 0; t < tokens; ++t)
    for (int h = 0; h < channels; h += head) {
      double total = 0;
      for (int m = 0; m < keys; ++m) {
        double score = 0;
        for (int i = h; i < h + head; ++i) score += q[t * channels + i] * kv[m * 2 * channels + i];
        total += weight[m] = std::exp(score * scale);
      }
      for (int m = 0; m < keys; ++m)
        for (int i = h; i < h + head; ++i)
          z[t * channels + i] += weight[m] / total * kv[m * 2 * channels + channels + i];
    }
  return z;
}

inline Values slice(const Tensor& x, int index, int count) {
  Values values(count);
  for (int i = 0; i < count; ++i) values[i] = x[std::size_t(index) * count + i];
  return values;
}

inline void append_residual(Values& all, const Values& x, const Values& y, double scale) {
  for (std::size_t i = 0; i < x.size(); ++i) all.push_back(x[i] + scale * y[i]);
}

struct MlpShape {
  int batch, height, width, channels, hidden;
  bool relu = false, scaled = false, bias = true;
};
struct AttentionShape {
  int batch, height, width, channels, heads;
  int sr = 1;
  bool linear = false, scaled = false, bias = true;
};
// `gap`: pixels between an image's rows, and between its planes, that are no part of it.
struct EmbedShape {
  int batch, height, width, in, channels, kernel, stride;
  bool channels_last = false;
  int gap = 0;
};
struct RowsShape {
  int batch, tokens, channels, classes;  // classes 0: no classifier
};

// Draws calls of one ISA's ops in one element type, every operand flush against a guard page.
class Cases {
 public:
  Cases(const std::string& isa, pvt::DType dtype, Flush flush)
      : factories_(pvt::factories(isa, dtype)), dtype_(dtype), flush_(flush) {}

  Tensor out(const Call& call) const { return Tensor(call.out_size, dtype_, flush_); }

  Call mlp(const MlpShape& s) {
    const int tokens = s.height * s.width;
    const Tensor x = draw(std::size_t(s.batch) * tokens * s.channels, 1, 0.5), gamma = draw_floats(s.channels, 0.2, 1),
                 beta = draw_floats(s.channels, 0.2);
    const Tensor w1 = draw(std::size_t(s.hidden) * s.channels, std::pow(s.channels, -0.5)),
                 b1 = draw_floats(s.hidden, 0.5);
    const Tensor wd = draw(s.hidden * 9, 0.33), bd = draw_floats(s.hidden, 0.5);
    const Tensor w2 = draw(std::size_t(s.hidden) * s.channels, std::pow(s.hidden, -0.5)),
                 b2 = draw_floats(s.channels, 0.5), scale = draw(s.batch);
    const pvt::MlpWeights weights{{gamma.floats(), beta.floats(), 1e-6f},
                                  {w1.data(), s.bias ? b1.floats() : nullptr},
                                  {wd.data(), s.bias ? bd.floats() : nullptr},
                                  {w2.data(), s.bias ? b2.floats() : nullptr},
                                  s.channels,
                                  s.hidden,
                                  s.relu};
    const std::shared_ptr<pvt::ResidualOp> op = factories_.mlp(weights);
    const auto run = [=](void* out) {
      op->run(x.data(), {s.batch, s.height, s.width}, s.scaled ? scale.data() : nullptr, out);
    };
    const auto expected = [=] {
      Values all;
      for (int b = 0; b < s.batch; ++b) {
        Values image = slice(x, b, tokens * s.channels), y = image;
        layer_norm(y, s.channels, gamma, beta, 1e-6);
        y = linear(y, s.channels, s.hidden, w1, s.bias ? &b1 : nullptr);
        if (s.relu)
          for (double& value : y) value = std::fmax(value, 0);
        y = convolve(y, s.height, s.width, s.hidden, s.hidden, 3, 1, 1, wd, s.bias ? &bd : nullptr, true);
        for (double& value : y) value = gelu(value);
        y = linear(y, s.hidden, s.channels, w2, s.bias ? &b2 : nullptr);
        append_residual(all, image, y, s.scaled ? scale[b] : 1);
      }
      return all;
    };
    return {"mlp " + size(s.batch, s.height, s.width, s.channels), x.size(), run, expected};
  }

  Call attention(const AttentionShape& s) {
    const int tokens = s.height * s.width, c2 = s.channels * s.channels, kernel = s.linear ? 1 : s.sr;
    const bool reduce = s.linear || s.sr > 1;
    const double spread = std::pow(s.channels, -0.5);
    const Tensor x = draw(std::size_t(s.batch) * tokens * s.channels, 1, 0.5), gamma = draw_floats(s.channels, 0.2, 1),
                 beta = draw_floats(s.channels, 0.2), scale = draw(s.batch);
    const Tensor wq = draw(c2, spread), bq = draw_floats(s.channels, 0.5), wkv = draw(2 * c2, spread),
                 bkv = draw_floats(2 * s.channels, 0.5);
    const Tensor wp = draw(c2, spread), bp = draw_floats(s.channels, 0.5);
    const Tensor ws = draw(std::size_t(c2) * kernel * kernel, spread / kernel), bs = draw_floats(s.channels, 0.5);
    const Tensor gs = draw_floats(s.channels, 0.2, 1), es = draw_floats(s.channels, 0.2);
    pvt::AttentionWeights w{};
    w.norm = {gamma.floats(), beta.floats(), 1e-6f};
    w.q = {wq.data(), s.bias ? bq.floats() : nullptr};
    w.kv = {wkv.data(), s.bias ? bkv.floats() : nullptr};
    w.proj = {wp.data(), s.bias ? bp.floats() : nullptr};
    if (reduce) w.sr = {ws.data(), s.bias ? bs.floats() : nullptr}, w.sr_norm = {gs.floats(), es.floats(), 1e-5f};
    w.channels = s.channels, w.heads = s.heads, w.sr_ratio = kernel, w.linear = s.linear;
    w.scale = float(std::pow(s.channels / s.heads, -0.5));
    const std::shared_ptr<pvt::ResidualOp> op = factories_.attention(w);
    const auto run = [=](void* out) {
      op->run(x.data(), {s.batch, s.height, s.width}, s.scaled ? scale.data() : nullptr, out);
    };
    const auto expected = [=] {
      Values all;
      for (int b = 0; b < s.batch; ++b) {
        const Values image = slice(x, b, tokens * s.channels);
        Values y = image;
        layer_norm(y, s.channels, gamma, beta, 1e-6);
        Values source = y;
        if (reduce) {
          const int from_height = s.linear ? 7 : s.height, from_width = s.linear ? 7 : s.width;
          if (s.linear) source = pool7(y, s.height, s.width, s.channels);
          source = convolve(source, from_height, from_width, s.channels, s.channels, kernel, kernel, 0, ws,
                            s.bias ? &bs : nullptr, false);
          layer_norm(source, s.channels, gs, es, 1e-5);
          for (double& value : source) value = s.linear ? gelu(value) : value;
        }
        const Values q = linear(y, s.channels, s.channels, wq, s.bias ? &bq : nullptr);
        const Values kv = linear(source, s.channels, 2 * s.channels, wkv, s.bias ? &bkv : nullptr);
        const Values z = attend(q, kv, s.channels, s.channels / s.heads, w.scale);
        append_residual(all, image, linear(z, s.channels, s.channels, wp, s.bias ? &bp : nullptr),
                        s.scaled ? scale[b] : 1);
      }
      return all;
    };
    return {"attention " + size(s.batch, s.height, s.width, s.channels), x.size(), run, expected};
  }

  Call patch_embed(const EmbedShape& s) {
    const int pad = s.kernel / 2, rows = (s.height + 2 * pad - s.kernel) / s.stride + 1,
              columns = (s.width + 2 * pad - s.kernel) / s.stride + 1;
    pvt::Image view{nullptr, s.batch, s.height, s.width, 0, 1, 0, s.in};
    view.stride_row = (s.width + s.gap) * view.stride_column;
    if (!s.channels_last) {
      view.stride_column = 1;
      view.stride_row = s.width + s.gap;
      view.stride_channel = s.height * view.stride_row + s.gap;
    }
    view.stride_batch = s.channels_last ? s.height * view.stride_row + s.gap : s.in * view.stride_channel;
    const auto place = [=](int b, int c, int y, int x) {
      return std::size_t(b * view.stride_batch + c * view.stride_channel + y * view.stride_row +
                         x * view.stride_column);
    };
    Tensor image(place(s.batch - 1, s.in - 1, s.height - 1, s.width - 1) + 1, dtype_, flush_);
    std::normal_distribution<double> normal(0.5, 1);
    for (int b = 0; b < s.batch; ++b)
      for (int c = 0; c < s.in; ++c)
        for (int y = 0; y < s.height; ++y)
          for (int x = 0; x < s.width; ++x) image.set(place(b, c, y, x), float(normal(random_)));
    image.seal();
    view.data = image.data();
    const Tensor gamma = draw_floats(s.channels, 0.2, 1), beta = draw_floats(s.channels, 0.2);
    const Tensor weight =
        draw(std::size_t(s.channels) * s.in * s.kernel * s.kernel, 1.0 / (s.kernel * std::sqrt(s.in)));
    const Tensor bias = draw_floats(s.channels, 0.5);
    const pvt::PatchEmbedWeights w{
        {weight.data(), bias.floats()}, {gamma.floats(), beta.floats(), 1e-5f}, s.in, s.channels, s.kernel, s.stride};
    const std::shared_ptr<pvt::PatchEmbed> op = factories_.patch_embed(w, s.channels_last);
    const auto expected = [=] {
      Values all;
      for (int b = 0; b < s.batch; ++b) {
        Values x;
        for (int i = 0; i < s.height * s.width; ++i)
          for (int c = 0; c < s.in; ++c) x.push_back(image[place(b, c, i / s.width, i % s.width)]);
        Values y = convolve(x, s.height, s.width, s.in, s.channels, s.kernel, s.stride, pad, weight, &bias, false);
        layer_norm(y, s.channels, gamma, beta, 1e-5);
        all.insert(all.end(), y.begin(), y.end());
      }
      return all;
    };
    return {"patch_embed " + size(s.batch, s.height, s.width, s.in), std::size_t(s.batch) * rows * columns * s.channels,
            [=](void* out) { op->run(view, out); }, expected};
  }

  Call norm(const RowsShape& s) {
    const Tensor x = draw(std::size_t(s.batch) * s.tokens * s.channels, 1, 3), gamma = draw_floats(s.channels, 0.2, 1),
                 beta = draw_floats(s.channels, 0.2);
    const std::shared_ptr<pvt::LayerNorm> op =
        factories_.layer_norm({gamma.floats(), beta.floats(), 1e-6f}, s.channels);
    const auto expected = [=] {
      Values all = slice(x, 0, int(x.size()));
      layer_norm(all, s.channels, gamma, beta, 1e-6);
      return all;
    };
    return {"layer_norm " + size(s.batch, s.tokens, 1, s.channels), x.size(),
            [=](void* out) { op->run(x.data(), std::int64_t(s.batch) * s.tokens, out); }, expected};
  }

  Call head(const RowsShape& s) {
    const Tensor x = draw(std::size_t(s.batch) * s.tokens * s.channels, 1, 3);
    const Tensor weight = draw(std::size_t(s.classes) * s.channels, std::pow(s.channels, -0.5)),
                 bias = draw_floats(s.classes, 0.5);
    const std::shared_ptr<pvt::Head> op =
        factories_.head(s.classes ? pvt::Linear{weight.data(), bias.floats()} : pvt::Linear{}, s.channels, s.classes);
    const auto expected = [=] {
      Values means(std::size_t(s.batch) * s.channels);
      for (std::size_t i = 0; i < x.size(); ++i)
        means[i / s.channels / s.tokens * s.channels + i % s.channels] += x[i] / s.tokens;
      return s.classes ? linear(means, s.channels, s.classes, weight, &bias) : means;
    };
    return {"head " + size(s.batch, s.tokens, 1, s.channels),
            std::size_t(s.batch) * (s.classes ? s.classes : s.channels),
            [=](void* out) { op->run(x.data(), s.batch, s.tokens, out); }, expected};
  }

 private:
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
