// Mean over tokens, then the classifier.
// Compiled once per ISA: included by isa/kernels-inl.h, which says how.

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
      T* to = static_cast<T*>(out) + b * channels_;
      for (int c = 0; c < channels_; c += kLanes) {
        const int count = std::min(kLanes, channels_ - c);
        Vec total{};
        for (std::int64_t t = 0; t < tokens; t += kTokens) {
          Vec some{};
          for (std::int64_t i = t; i < std::min(tokens, t + kTokens); ++i) {
            const T* at = from + i * channels_ + c;
            some += count == kLanes ? load(at) : load_first(at, count);
          }
          total += some;
        }
        const Vec mean = total * (1.0f / tokens);
        if (classes_)
          store(means + b * wide + c, mean);
        else
          store_first(to + c, mean, count);
      }
      if (classes_) std::fill(means + b * wide + round_up(channels_, kLanes), means + (b + 1) * wide, E{});
    });
    if (!classes_) return;
    const Epilogue<T> epilogue = store_rows(static_cast<T*>(out), classes_, classifier_.bias.data());
    parallel_for(classifier_.panels(), [&](std::int64_t p) {
      const MatrixUnit unit;
      gemm_panel(rows_of(means, 0, wide), int(batch), classifier_.panel(int(p)), int(p) * kPanel, epilogue);
    });
  }

 private:
  static constexpr std::int64_t kTokens = 16;  // summed before they are added to the rest: see kDepthBlock

  int channels_, classes_;
  PackedMatrix<E> classifier_;
};
