// The depthwise 3x3 convolution of one row of a panel.
// Compiled once per ISA: included by isa/kernels-inl.h, which says how.

constexpr int kTaps = 10;  // of a channel: nine and the bias

// [panel][kTaps][kPanel] of a depthwise convolution (channels, 1, 3, 3), zero past its channels.
template <class T>
Buffer<float> pack_taps(const Linear& conv, int channels, int panels) {
  Buffer<float> packed(std::size_t(panels) * kTaps * kPanel);
  const T* taps = static_cast<const T*>(conv.weight);
  for (int c = 0; c < channels; ++c) {
    float* panel = packed.data() + std::size_t(c / kPanel) * kTaps * kPanel + c % kPanel;
    for (int i = 0; i < 9; ++i) panel[i * kPanel] = to_float(taps[c * 9 + i]);
    panel[9 * kPanel] = conv.bias ? conv.bias[c] : 0.0f;
  }
  return packed;
}

// Rows of a panel have a zero column at either end, the convolution's padding.
inline std::size_t padded_row(int width) { return std::size_t(width + 2) * kPanel; }

// kColumns sums of nine products each, from column c on, of the three rows `above`: each loaded value serves up to
// three of them. They start from `bias`.
template <int kColumns>
PVT_INLINE void convolve_columns(const float* const (&above)[3], int c, const Vec (&taps)[9], Vec bias,
                                 Vec (&acc)[kColumns]) {
  for (int i = 0; i < kColumns; ++i) acc[i] = bias;
#pragma GCC unroll 3
  for (int dy = 0; dy < 3; ++dy) {
    const float* row = above[dy] + c * kPanel;
#pragma GCC unroll 6
    for (int j = 0; j < kColumns + 2; ++j) {
      const Vec value = load(row + j * kPanel);
#pragma GCC unroll 3
      for (int dx = 0; dx < 3; ++dx)
        if (j - dx >= 0 && j - dx < kColumns) acc[j - dx] += value * taps[dy * 3 + dx];
    }
  }
}

// finish(column, sum) for all columns of a row, four at a time.
template <class Finish>
PVT_INLINE void convolve_row(const float* const (&above)[3], int width, const Vec (&taps)[9], Vec bias,
                             const Finish& finish) {
  const auto columns = [&](auto count, int c) PVT_LAMBDA {
    Vec acc[decltype(count)::value];
    convolve_columns(above, c, taps, bias, acc);
    for (int i = 0; i < count; ++i) finish(c + i, acc[i]);
  };
  int c = 0;
  for (; c + 4 <= width; c += 4) columns(std::integral_constant<int, 4>(), c);
  if (c + 2 <= width) {
    columns(std::integral_constant<int, 2>(), c);
    c += 2;
  }
  if (c < width) columns(std::integral_constant<int, 1>(), c);
}
