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
    return pack<E, T>(linear, channels, parts * inner(), kElements, elements(parts, channels), elements(parts, 1));
  }
  template <class E, class T>
  PackedMatrix<E> pack_projection(const Linear& linear) const {
    return pack<E, T>(linear, inner(), channels, elements(1, 1), rows_of_torch(channels), kElements);
  }

  // The transposed of both, for the gradients of their inputs.
  template <class E, class T>
  PackedMatrix<E> pack_inputs_backward(const Linear& linear, int parts) const {
    return pack<E, T>(linear, parts * inner(), channels, elements(parts, channels), kElements);
  }
  template <class E, class T>
  PackedMatrix<E> pack_projection_backward(const Linear& linear) const {
    return pack<E, T>(linear, channels, inner(), rows_of_torch(channels), elements(1, 1));
  }

  int channels, count;
  int width;  // padded columns of one head

 private:
  // Offsets of packed columns of q or kv in torch's, `size` elements each.
  auto elements(int parts, int size) const {
    return [=](int n) { return torch_row(n, parts) * size; };
  }
};
