// Checks every op of every ISA that this CPU runs against plain loops in double. No Python: this is what the
// sanitizers run, and what a cross-compiled build would run.
//
//   test_kernels [isa ...]   all runnable ISAs unless some are named
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

namespace {

using Values = std::vector<double>;

// Values as the kernels see them: float, or the bf16 nearest to it, in dense storage.
class Tensor {
 public:
  Tensor(std::size_t size, pvt::DType dtype, double mean, double deviation, std::mt19937& random) : dtype_(dtype) {
    std::normal_distribution<double> normal(mean, deviation);
    for (std::size_t i = 0; i < size; ++i) push(float(normal(random)));
  }
  explicit Tensor(std::size_t size, pvt::DType dtype) : dtype_(dtype) {
    for (std::size_t i = 0; i < size; ++i) push(NAN);
  }
  const void* data() const {
    return dtype_ == pvt::DType::f32 ? (const void*)floats_.data() : (const void*)halves_.data();
  }
  void* data() { return const_cast<void*>(static_cast<const Tensor*>(this)->data()); }
  std::size_t size() const { return dtype_ == pvt::DType::f32 ? floats_.size() : halves_.size(); }
  double operator[](std::size_t i) const {
    if (dtype_ == pvt::DType::f32) return floats_[i];
    const std::uint32_t bits = std::uint32_t{halves_[i]} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

 private:
  void push(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (dtype_ == pvt::DType::f32)
      floats_.push_back(value);
    else
      halves_.push_back(std::uint16_t((bits + 0x8000) >> 16));
  }
  pvt::DType dtype_;
  std::vector<float> floats_;
  std::vector<std::uint16_t> halves_;
};

double gelu(double x) { return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))); }

// rows of `channels`: LayerNorm, in place
void layer_norm(Values& x, int channels, const Tensor& weight, const Tensor& bias, double eps) {
  for (std::size_t at = 0; at < x.size(); at += channels) {
    double mean = 0, variance = 0;
    for (int c = 0; c < channels; ++c) mean += x[at + c] / channels;
    for (int c = 0; c < channels; ++c) variance += (x[at + c] - mean) * (x[at + c] - mean) / channels;
    for (int c = 0; c < channels; ++c) x[at + c] = (x[at + c] - mean) / std::sqrt(variance + eps) * weight[c] + bias[c];
  }
}

Values linear(const Values& x, int in, int out, const Tensor& weight, const Tensor* bias) {
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
Values convolve(const Values& x, int height, int width, int in, int out, int k, int stride, int pad,
                const Tensor& weight, const Tensor& bias, bool depthwise) {
  const int rows = (height + 2 * pad - k) / stride + 1, columns = (width + 2 * pad - k) / stride + 1;
  const int per = depthwise ? 1 : in;
  Values y(std::size_t(rows) * columns * out);
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c)
      for (int n = 0; n < out; ++n) {
        double total = bias[n];
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

Values pool7(const Values& x, int height, int width, int channels) {
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

struct Run {
  std::string isa;
  pvt::DType dtype;
  int passed = 0, failed = 0;
  std::mt19937 random{7};

  Tensor draw(std::size_t size, double deviation = 1, double mean = 0) {
    return Tensor(size, dtype, mean, deviation, random);
  }
  const pvt::Factories& factories() const { return pvt::factories(isa, dtype); }

  // The largest error may be a few roundings of the largest value: sums of n terms in float err by far less than
  // sqrt(n) of them, and bf16 rounds each of an op's inner results (up to six) once.
  void check(const std::string& what, const Tensor& actual, const Values& expected) {
    const double unit = dtype == pvt::DType::f32 ? 1.2e-7 : 7.9e-3;
    double largest = 0, error = 0;
    for (double value : expected) largest = std::fmax(largest, std::fabs(value));
    for (std::size_t i = 0; i < expected.size(); ++i) {
      const double e = std::fabs(actual[i] - expected[i]);
      if (!(e <= error)) error = e;
    }
    const double bound = (dtype == pvt::DType::f32 ? 32 : 4) * unit * largest;
    if (actual.size() == expected.size() && error <= bound) {
      ++passed;
      return;
    }
    ++failed;
    std::printf("FAILED %s %s %s: error %.3e, bound %.3e\n", isa.c_str(), dtype == pvt::DType::f32 ? "f32" : "bf16",
                what.c_str(), error, bound);
  }

  void mlp(int batch, int height, int width, int channels, int hidden, bool relu, bool scaled) {
    const int tokens = height * width;
    Tensor x = draw(std::size_t(batch) * tokens * channels, 1, 0.5), gamma = draw(channels, 0.2, 1),
           beta = draw(channels, 0.2);
    Tensor w1 = draw(std::size_t(hidden) * channels, std::pow(channels, -0.5)), b1 = draw(hidden, 0.5);
    Tensor wd = draw(hidden * 9, 0.33), bd = draw(hidden, 0.5);
    Tensor w2 = draw(std::size_t(hidden) * channels, std::pow(hidden, -0.5)), b2 = draw(channels, 0.5),
           scale = draw(batch);
    Tensor out(x.size(), dtype);
    const pvt::MlpWeights weights{{gamma.data(), beta.data(), 1e-6f},
                                  {w1.data(), b1.data()},
                                  {wd.data(), bd.data()},
                                  {w2.data(), b2.data()},
                                  channels,
                                  hidden,
                                  relu};
    factories().mlp(weights)->run(x.data(), {batch, height, width}, scaled ? scale.data() : nullptr, out.data());
    Values expected;
    for (int b = 0; b < batch; ++b) {
      Values image = slice(x, b, tokens * channels), y = image;
      layer_norm(y, channels, gamma, beta, 1e-6);
      y = linear(y, channels, hidden, w1, &b1);
      if (relu)
        for (double& value : y) value = std::fmax(value, 0);
      y = convolve(y, height, width, hidden, hidden, 3, 1, 1, wd, bd, true);
      for (double& value : y) value = gelu(value);
      append_residual(expected, image, linear(y, hidden, channels, w2, &b2), scaled ? scale[b] : 1);
    }
    check("mlp " + size(batch, height, width, channels), out, expected);
  }

  void attention(int batch, int height, int width, int channels, int heads, int sr, bool is_linear, bool bias) {
    const int tokens = height * width, c2 = channels * channels, head = channels / heads, kernel = is_linear ? 1 : sr;
    const bool reduce = is_linear || sr > 1;
    const double spread = std::pow(channels, -0.5);
    Tensor x = draw(std::size_t(batch) * tokens * channels, 1, 0.5), gamma = draw(channels, 0.2, 1),
           beta = draw(channels, 0.2);
    Tensor wq = draw(c2, spread), bq = draw(channels, 0.5), wkv = draw(2 * c2, spread), bkv = draw(2 * channels, 0.5);
    Tensor wp = draw(c2, spread), bp = draw(channels, 0.5);
    Tensor ws = draw(std::size_t(c2) * kernel * kernel, spread / kernel), bs = draw(channels, 0.5);
    Tensor gs = draw(channels, 0.2, 1), es = draw(channels, 0.2);
    Tensor out(x.size(), dtype);
    pvt::AttentionWeights w{};
    w.norm = {gamma.data(), beta.data(), 1e-6f};
    w.q = {wq.data(), bias ? bq.data() : nullptr};
    w.kv = {wkv.data(), bias ? bkv.data() : nullptr};
    w.proj = {wp.data(), bp.data()};
    if (reduce) w.sr = {ws.data(), bs.data()}, w.sr_norm = {gs.data(), es.data(), 1e-5f};
    w.channels = channels, w.heads = heads, w.sr_ratio = kernel, w.linear = is_linear;
    w.scale = float(std::pow(head, -0.5));
    factories().attention(w)->run(x.data(), {batch, height, width}, nullptr, out.data());
    Values expected;
    for (int b = 0; b < batch; ++b) {
      const Values image = slice(x, b, tokens * channels);
      Values y = image, source = image;
      layer_norm(y, channels, gamma, beta, 1e-6);
      source = y;
      if (reduce) {
        source = is_linear ? pool7(y, height, width, channels) : y;
        const int from_height = is_linear ? 7 : height, from_width = is_linear ? 7 : width;
        source = convolve(source, from_height, from_width, channels, channels, kernel, kernel, 0, ws, bs, false);
        layer_norm(source, channels, gs, es, 1e-5);
        if (is_linear)
          for (double& value : source) value = gelu(value);
      }
      const Values q = linear(y, channels, channels, wq, bias ? &bq : nullptr);
      const Values kv = linear(source, channels, 2 * channels, wkv, bias ? &bkv : nullptr);
      append_residual(expected, image, linear(attend(q, kv, channels, head, w.scale), channels, channels, wp, &bp), 1);
    }
    check("attention " + size(batch, height, width, channels), out, expected);
  }

  void patch_embed(int batch, int height, int width, int in, int out_channels, int kernel, int stride,
                   bool channels_last) {
    const int pad = kernel / 2, pixels = height * width;
    Tensor image = draw(std::size_t(batch) * pixels * in, 1, 0.5), gamma = draw(out_channels, 0.2, 1),
           beta = draw(out_channels, 0.2);
    Tensor weight = draw(std::size_t(out_channels) * in * kernel * kernel, 1.0 / (kernel * std::sqrt(in))),
           bias = draw(out_channels, 0.5);
    const int rows = (height + 2 * pad - kernel) / stride + 1, columns = (width + 2 * pad - kernel) / stride + 1;
    Tensor out(std::size_t(batch) * rows * columns * out_channels, dtype);
    const pvt::PatchEmbedWeights w{
        {weight.data(), bias.data()}, {gamma.data(), beta.data(), 1e-5f}, in, out_channels, kernel, stride};
    const pvt::Image view = channels_last
                                ? pvt::Image{image.data(), batch, height, width, pixels * in, 1, width * in, in}
                                : pvt::Image{image.data(), batch, height, width, pixels * in, pixels, width, 1};
    factories().patch_embed(w, channels_last)->run(view, out.data());
    Values expected;
    for (int b = 0; b < batch; ++b) {
      Values x(std::size_t(pixels) * in);
      for (int i = 0; i < pixels; ++i)
        for (int c = 0; c < in; ++c)
          x[i * in + c] = image[std::size_t(b) * pixels * in + (channels_last ? i * in + c : c * pixels + i)];
      Values y = convolve(x, height, width, in, out_channels, kernel, stride, pad, weight, bias, false);
      layer_norm(y, out_channels, gamma, beta, 1e-5);
      expected.insert(expected.end(), y.begin(), y.end());
    }
    check("patch_embed " + size(batch, height, width, in), out, expected);
  }

  void norm_and_head(int batch, int tokens, int channels, int classes) {
    Tensor x = draw(std::size_t(batch) * tokens * channels, 1, 3), gamma = draw(channels, 0.2, 1),
           beta = draw(channels, 0.2);
    Tensor weight = draw(std::size_t(classes) * channels, std::pow(channels, -0.5)), bias = draw(classes, 0.5);
    Tensor normed(x.size(), dtype), logits(std::size_t(batch) * classes, dtype);
    factories()
        .layer_norm({gamma.data(), beta.data(), 1e-6f}, channels)
        ->run(x.data(), std::int64_t(batch) * tokens, normed.data());
    Values expected = slice(x, 0, batch * tokens * channels);
    layer_norm(expected, channels, gamma, beta, 1e-6);
    check("layer_norm " + size(batch, tokens, 1, channels), normed, expected);
    factories().head({weight.data(), bias.data()}, channels, classes)->run(x.data(), batch, tokens, logits.data());
    Values means(std::size_t(batch) * channels);
    for (int b = 0; b < batch; ++b)
      for (int t = 0; t < tokens; ++t)
        for (int c = 0; c < channels; ++c)
          means[b * channels + c] += x[(std::size_t(b) * tokens + t) * channels + c] / tokens;
    check("head " + size(batch, tokens, 1, channels), logits, linear(means, channels, classes, weight, &bias));
  }

 private:
  static std::string size(int batch, int height, int width, int channels) {
    return std::to_string(batch) + "x" + std::to_string(height) + "x" + std::to_string(width) + "x" +
           std::to_string(channels);
  }
  static Values slice(const Tensor& x, int index, int count) {
    Values values(count);
    for (int i = 0; i < count; ++i) values[i] = x[std::size_t(index) * count + i];
    return values;
  }
  static void append_residual(Values& all, const Values& x, const Values& y, double scale) {
    for (std::size_t i = 0; i < x.size(); ++i) all.push_back(x[i] + scale * y[i]);
  }
  static Values attend(const Values& q, const Values& kv, int channels, int head, double scale) {
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
};

void run_all(Run& run) {
  run.mlp(3, 5, 9, 24, 70, false, true);
  run.mlp(1, 30, 6, 64, 128, true, false);  // tall enough for bands
  run.mlp(2, 1, 1, 33, 40, false, false);
  run.mlp(1, 7, 7, 96, 384, false, false);
  run.attention(2, 6, 7, 36, 3, 2, false, true);
  run.attention(1, 9, 8, 64, 2, 1, false, false);
  run.attention(2, 10, 3, 20, 1, 1, true, true);
  run.attention(1, 16, 16, 32, 1, 8, false, true);
  run.attention(1, 1, 1, 40, 5, 1, false, true);
  run.patch_embed(2, 21, 17, 3, 40, 7, 4, false);
  run.patch_embed(1, 9, 12, 3, 64, 7, 4, true);
  run.patch_embed(2, 7, 6, 20, 48, 3, 2, true);
  run.patch_embed(1, 1, 1, 5, 9, 3, 2, false);
  run.norm_and_head(3, 10, 50, 11);
  run.norm_and_head(1, 49, 512, 100);
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> isas(argv + 1, argv + argc);
  if (isas.empty()) isas = pvt::runnable_isas();
  int passed = 0, failed = 0;
  for (const std::string& isa : isas)
    for (pvt::DType dtype : {pvt::DType::f32, pvt::DType::bf16}) {
      Run run{isa, dtype};
      run_all(run);
      std::printf("%-12s %-4s %3d passed\n", isa.c_str(), dtype == pvt::DType::f32 ? "f32" : "bf16", run.passed);
      passed += run.passed;
      failed += run.failed;
    }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
