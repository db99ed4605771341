// Attention's weights, packed by heads: each is padded to whole narrow panels with zero weights, so that any head width
// works.
// Compiled once per ISA: included by isa/kernels-inl.h, which says how.

struct Heads {
  Heads(int channels, int count) : channels(channels), count(count), width(int(row_width(channels / count))) {}

  int inner() const { return count * width; }  // padded columns of all heads

  // Torch's row of q's (parts = 1) or kv's (parts = 2) packed column n, or -1 for padding.
  std::ptrdiff_t torch_row(int n, int parts) const {
    const int head = channels / count, i = n % width, part = n / width % parts, h = n / width / parts;
    return i < head ? std::ptrdiff_t(part) * channels + h * head + i : -1;
  }

  // q (parts = 1) or kv (parts = 2). A head's key and value lie side by side.
  template <class E, class T>
  PackedMatrix<E> pack_inputs(const Linear& linear, int parts) const {
    const T* weight = static_cast<const T*>(linear.weight);
    const auto row = [&](int n) { return torch_row(n, parts); };
    return pack<E>(
        channels, parts * inner(),
        [&](int k, int n) { return row(n) < 0 ? 0.0f : to_float(weight[row(n) * channels + k]); },
        [&](int n) { return linear.bias == nullptr || row(n) < 0 ? 0.0f : linear.bias[row(n)]; });
  }

  template <class E, class T>
  PackedMatrix<E> pack_projection(const Linear& linear) const {
    const int head = channels / count;
    const T* weight = static_cast<const T*>(linear.weight);
    return pack<E>(
        inner(), channels,
        [&](int k, int n) {
          const int i = k % width, h = k / width;
          return i < head ? to_float(weight[std::ptrdiff_t(n) * channels + h * head + i]) : 0.0f;
        },
        [&](int n) { return linear.bias ? linear.bias[n] : 0.0f; });
  }

  // For the gradients of inputs: q or kv with its packed columns as rows, and the projection with its rows as columns.
  template <class E, class T>
  PackedMatrix<E> pack_inputs_backward(const Linear& linear, int parts) const {
    const T* weight = static_cast<const T*>(linear.weight);
    return pack<E>(
        parts * inner(), channels,
        [&](int k, int n) {
          const std::ptrdiff_t row = torch_row(k, parts);
          return row < 0 ? 0.0f : to_float(weight[row * channels + n]);
        },
        [](int) { return 0.0f; });
  }
  template <class E, class T>
  PackedMatrix<E> pack_projection_backward(const Linear& linear) const {
    const T* weight = static_cast<const T*>(linear.weight);
    return pack<E>(
        channels, inner(),
        [&](int k, int n) {
          const std::ptrdiff_t column = torch_row(n, 1);
          return column < 0 ? 0.0f : to_float(weight[std::ptrdiff_t(k) * channels + column]);
        },
        [](int) { return 0.0f; });
  }

  int channels, count;
  int width;  // padded columns of one head
};
