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

// A torch convolution (out, in, kernel, kernel) whose input rows are [dy][dx][channel] (channels last, each pixel
// padded with zeros to `pitch` elements) or [dy][channel][dx].
template <class E, class T>
PackedMatrix<E> pack_conv(const Linear& conv, int out, int in, int kernel, bool channels_last, int pitch) {
  const T* weight = static_cast<const T*>(conv.weight);
  return pack<E>(
      kernel * kernel * pitch, out,
      [&](int k, int n) {
        const int inner = k % (kernel * pitch), dy = k / (kernel * pitch);
        const int dx = channels_last ? inner / pitch : inner % kernel;
        const int c = channels_last ? inner % pitch : inner / kernel;
        if (c >= in) return 0.0f;
        return to_float(weight[((std::size_t(n) * in + c) * kernel + dy) * kernel + dx]);
      },
      [&](int n) { return conv.bias ? conv.bias[n] : 0.0f; });
}
