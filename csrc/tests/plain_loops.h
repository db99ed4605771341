// The ops by plain loops in double, and the shapes that they are called with.
#pragma once

#include <cmath>
#include <cstddef>
#include <vector>

using Values = std::vector<double>;

inline double gelu(double x) { return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))); }

// rows of `channels`: LayerNorm, in place
inline void layer_norm(Values& x, int channels, const Values& weight, const Values& bias, double eps) {
  for (std::size_t at = 0; at < x.size(); at += channels) {
    double mean = 0, variance = 0;
    for (int c = 0; c < channels; ++c) mean += x[at + c] / channels;
    for (int c = 0; c < channels; ++c) variance += (x[at + c] - mean) * (x[at + c] - mean) / channels;
    for (int c = 0; c < channels; ++c) x[at + c] = (x[at + c] - mean) / std::sqrt(variance + eps) * weight[c] + bias[c];
  }
}

// bias: empty for none
inline Values linear(const Values& x, int in, int out, const Values& weight, const Values& bias) {
  const std::size_t rows = x.size() / in;
  Values y(rows * out);
  for (std::size_t r = 0; r < rows; ++r)
    for (int n = 0; n < out; ++n) {
      double total = bias.empty() ? 0 : bias[n];
      for (int k = 0; k < in; ++k) total += x[r * in + k] * weight[std::size_t(n) * in + k];
      y[r * out + n] = total;
    }
  return y;
}

// A convolution of one image [height][width][in] into [rows][columns][out], kernel k, padding `pad`.
inline Values convolve(const Values& x, int height, int width, int in, int out, int k, int stride, int pad,
                       const Values& weight, const Values& bias, bool depthwise) {
  const int rows = (height + 2 * pad - k) / stride + 1, columns = (width + 2 * pad - k) / stride + 1;
  const int per = depthwise ? 1 : in;
  Values y(std::size_t(rows) * columns * out);
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c)
      for (int n = 0; n < out; ++n) {
        double total = bias.empty() ? 0 : bias[n];
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

// Each op by plain loops: of its input, and of its weights in the order of the contract, an empty one where there is
// none.

inline Values mlp(const MlpShape& s, const Values& x, const std::vector<Values>& w, const Values& scale) {
  const int size = s.height * s.width * s.channels;
  Values all;
  for (int b = 0; b < s.batch; ++b) {
    const Values image(x.begin() + b * size, x.begin() + (b + 1) * size);
    Values y = image;
    layer_norm(y, s.channels, w[0], w[1], 1e-6);
    y = linear(y, s.channels, s.hidden, w[2], w[3]);
    if (s.relu)
      for (double& value : y) value = std::fmax(value, 0);
    y = convolve(y, s.height, s.width, s.hidden, s.hidden, 3, 1, 1, w[4], w[5], true);
    for (double& value : y) value = gelu(value);
    y = linear(y, s.hidden, s.channels, w[6], w[7]);
    append_residual(all, image, y, s.scaled ? scale[b] : 1);
  }
  return all;
}

inline Values attention(const AttentionShape& s, const Values& x, const std::vector<Values>& w, const Values& scale) {
  const int size = s.height * s.width * s.channels, kernel = s.linear ? 1 : s.sr;
  Values all;
  for (int b = 0; b < s.batch; ++b) {
    const Values image(x.begin() + b * size, x.begin() + (b + 1) * size);
    Values y = image;
    layer_norm(y, s.channels, w[0], w[1], 1e-6);
    Values source = y;
    if (s.linear || s.sr > 1) {
      const int from_height = s.linear ? 7 : s.height, from_width = s.linear ? 7 : s.width;
      if (s.linear) source = pool7(y, s.height, s.width, s.channels);
      source = convolve(source, from_height, from_width, s.channels, s.channels, kernel, kernel, 0, w[6], w[7], false);
      layer_norm(source, s.channels, w[8], w[9], 1e-5);
      for (double& value : source) value = s.linear ? gelu(value) : value;
    }
    const Values q = linear(y, s.channels, s.channels, w[2], w[3]);
    const Values kv = linear(source, s.channels, 2 * s.channels, w[4], w[5]);
    const Values z = attend(q, kv, s.channels, s.channels / s.heads, float(std::pow(s.channels / s.heads, -0.5)));
    append_residual(all, image, linear(z, s.channels, s.channels, w[10], w[11]), s.scaled ? scale[b] : 1);
  }
  return all;
}

// x: dense images, channels last.
inline Values patch_embed(const EmbedShape& s, const Values& x, const std::vector<Values>& w) {
  const int size = s.height * s.width * s.in;
  Values all;
  for (int b = 0; b < s.batch; ++b) {
    const Values image(x.begin() + b * size, x.begin() + (b + 1) * size);
    Values y =
        convolve(image, s.height, s.width, s.in, s.channels, s.kernel, s.stride, s.kernel / 2, w[0], w[1], false);
    layer_norm(y, s.channels, w[2], w[3], 1e-5);
    all.insert(all.end(), y.begin(), y.end());
  }
  return all;
}

inline Values head(const RowsShape& s, const Values& x, const std::vector<Values>& w) {
  Values means(std::size_t(s.batch) * s.channels);
  for (std::size_t i = 0; i < x.size(); ++i)
    means[i / s.channels / s.tokens * s.channels + i % s.channels] += x[i] / s.tokens;
  return s.classes ? linear(means, s.channels, s.classes, w[0], w[1]) : means;
}
