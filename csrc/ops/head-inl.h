// Mean over tokens, then the classifier.
// Compiled once per ISA: included by isa/kernels-inl.h, which says how.

// out (width) = the mean of `tokens` rows, zero past the channels. Some are summed before they are added to the rest:
// see kDepthBlock.
template <class T, class Out>
void mean_of_tokens(const T* x, std::int64_t tokens, int channels, Out* out, std::size_t width) {
  constexpr std::int64_t kTokens = 16;
  for (int c = 0; c < channels; c += kLanes) {
    const int count = std::min(kLanes, channels - c);
    Vec total{};
    for (std::int64_t t = 0; t < tokens; t += kTokens) {
      Vec some{};
      for (std::int64_t i = t; i < std::min(tokens, t + kTokens); ++i)
        some += load_columns(x + i * channels + c, count);
      total += some;
    }
    store_columns(out + c, total * (1.0f / tokens), c + kLanes <= int(width) ? kLanes : count);
  }
  for (std::size_t c = round_up(channels, kLanes); c < width; ++c) out[c] = Out{};
}

template <class T, class E>
class HeadOp final : public Head {
 public:
  HeadOp(const Linear& classifier, int channels, int classes)
      : channels_(channels), classes_(classifier.weight == nullptr ? 0 : classes) {
    if (classes_) classifier_ = pack_linear<E, T>(classifier, classes, channels);
  }

  int channels() const override { return channels_; }
  int classes() const override { return classes_ ? classes_ : channels_; }

  void run(const void* x, std::int64_t batch, std::int64_t tokens, void* out) const override {
    const std::size_t wide = row_width(channels_);
    E* means = std::get<0>(shared_scratch().take(array<E>(row_room(batch) * wide)));
    parallel_for(batch, [&](std::int64_t b) {
      const T* from = static_cast<const T*>(x) + b * tokens * channels_;
      if (classes_)
        mean_of_tokens(from, tokens, channels_, means + b * wide, wide);
      else
        mean_of_tokens(from, tokens, channels_, static_cast<T*>(out) + b * channels_, channels_);
    });
    if (!classes_) return;
    const Epilogue<T> epilogue = store_rows(static_cast<T*>(out), classes_, classifier_.bias.data());
    parallel_for(classifier_.panels(), [&](std::int64_t p) {
      const MatrixUnit unit;
      gemm_panel(rows_of(means, 0, wide), int(batch), classifier_.panel(int(p)), int(p) * kPanel, epilogue);
    });
  }

 private:
  int channels_, classes_;
  PackedMatrix<E> classifier_;
};
