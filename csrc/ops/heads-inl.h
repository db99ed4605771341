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
    return pack<E>(
        channels, parts * inner(), [&](int k, int n) { return input<T>(linear, parts, n, k); },
        [&](int n) {
          const std::ptrdiff_t row = torch_row(n, parts);
          return linear.bias == nullptr || row < 0 ? 0.0f : linear.bias[row];
        });
  }
  template <class E, class T>
  PackedMatrix<E> pack_projection(const Linear& linear) const {
    return pack<E>(
        inner(), channels, [&](int k, int n) { return projection<T>(linear, n, k); },
        [&](int n) { return linear.bias ? linear.bias[n] : 0.0f; });
  }

  // The transposed of both, for the gradients of their inputs.
  template <class E, class T>
  PackedMatrix<E> pack_inputs_backward(const Linear& linear, int parts) const {
    return pack<E>(
        parts * inner(), channels, [&](int k, int n) { return input<T>(linear, parts, k, n); },
        [](int) { return 0.0f; });
  }
  template <class E, class T>
  PackedMatrix<E> pack_projection_backward(const Linear& linear) const {
    return pack<E>(
        channels, inner(), [&](int k, int n) { return projection<T>(linear, k, n); }, [](int) { return 0.0f; });
  }

  int channels, count;
  int width;  // padded columns of one head

 private:
  // What column `column` of q or kv, packed, takes of channel `channel`.
  template <class T>
  float input(const Linear& linear, int parts, int column, int channel) const {
    const std::ptrdiff_t row = torch_row(column, parts);
    return row < 0 ? 0.0f : to_float(static_cast<const T*>(linear.weight)[row * channels + channel]);
  }
  // What channel `channel` of the projection takes of packed column `column` of the heads.
  template <class T>
  float projection(const Linear& linear, int channel, int column) const {
    const std::ptrdiff_t from = torch_row(column, 1);
    return from < 0 ? 0.0f : to_float(static_cast<const T*>(linear.weight)[std::ptrdiff_t(channel) * channels + from]);
  }
};
