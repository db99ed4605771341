// From torch's weight layouts to packed ones.
// Compiled once per ISA: included by isa/kernels-inl.h, which says how.

// The packed rows x cols matrix whose element (k, n) is at(k, n), with bias(n).
template <class E, class At, class Bias>
PackedMatrix<E> pack(int rows, int cols, const At& at, const Bias& bias) {
  PackedMatrix<E> packed(rows, cols);
  for (int n = 0; n < cols; ++n) {
    for (int k = 0; k < rows; ++k) assign(packed.data[packed.layout.index(k, n)], at(k, n));
    packed.bias[n] = bias(n);
  }
  return packed;
}

// A torch linear (out, in), transposed: rows = in, columns = out.
template <class E, class T>
PackedMatrix<E> pack_linear(const Linear& linear, int out, int in) {
  const T* weight = static_cast<const T*>(linear.weight);
  return pack<E>(
      in, out, [&](int k, int n) { return to_float(weight[std::size_t(n) * in + k]); },
      [&](int n) { return linear.bias ? linear.bias[n] : 0.0f; });
}

// The same as torch has it: rows = out, columns = in, for the gradient of its input.
template <class E, class T>
PackedMatrix<E> pack_backward(const Linear& linear, int out, int in) {
  const T* weight = static_cast<const T*>(linear.weight);
  return pack<E>(
      out, in, [&](int k, int n) { return to_float(weight[std::size_t(k) * in + n]); }, [](int) { return 0.0f; });
}

// The rows that a convolution multiplies: patches [dy][dx][channel] (channels last, each pixel padded with zeros to
// `pitch` elements) or [dy][channel][dx].
struct PatchRows {
  int in, kernel;
  bool channels_last;
  int pitch;

  int size() const { return kernel * kernel * pitch; }
  // Where element n of a patch lies among torch's (in, kernel, kernel), or -1 for padding.
  int torch_column(int n) const {
    const int inner = n % (kernel * pitch), dy = n / (kernel * pitch);
    const int dx = channels_last ? inner / pitch : inner % kernel;
    const int c = channels_last ? inner % pitch : inner / kernel;
    return c < in ? (c * kernel + dy) * kernel + dx : -1;
  }
  template <class T>
  float weight(const Linear& conv, int out, int n) const {
    const int column = torch_column(n);
    const std::ptrdiff_t row = std::ptrdiff_t(out) * in * kernel * kernel;
    return column < 0 ? 0.0f : to_float(static_cast<const T*>(conv.weight)[row + column]);
  }
  // A panel's columns of the gradient (out, size), transposed to torch's (out, in, kernel, kernel).
  void store_gradient(const float* found, int out, int panel, int columns, float* to) const {
    for (int j = 0; j < columns && panel * kPanel + j < size(); ++j) {
      const int column = torch_column(panel * kPanel + j);
      for (int n = 0; n < out && column >= 0; ++n)
        to[std::ptrdiff_t(n) * in * kernel * kernel + column] = found[n * kPanel + j];
    }
  }
};

// A torch convolution (out, in, kernel, kernel), transposed.
template <class E, class T>
PackedMatrix<E> pack_conv(const Linear& conv, int out, const PatchRows& patches) {
  return pack<E>(
      patches.size(), out, [&](int k, int n) { return patches.weight<T>(conv, n, k); },
      [&](int n) { return conv.bias ? conv.bias[n] : 0.0f; });
}
// The same as torch has it.
template <class E, class T>
PackedMatrix<E> pack_conv_backward(const Linear& conv, int out, const PatchRows& patches) {
  return pack<E>(
      out, patches.size(), [&](int k, int n) { return patches.weight<T>(conv, k, n); }, [](int) { return 0.0f; });
}
