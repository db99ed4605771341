// Overlap patch embed: LayerNorm of a convolution's tokens.
// Compiled once per ISA: included by isa/kernels-inl.h, which says how.

template <class T, class E>
class PatchEmbedOp final : public PatchEmbed {
 public:
  PatchEmbedOp(const PatchEmbedWeights& w, bool channels_last)
      : in_channels_(w.in_channels),
        channels_(w.channels),
        kernel_(w.kernel),
        stride_(w.stride),
        channels_last_(channels_last),
        proj_(pack_conv<E, T>(w.proj, w.channels, w.in_channels, w.kernel, channels_last, w.in_channels)),
        norm_(w.norm, w.channels, static_cast<const T*>(nullptr)) {}

  int in_channels() const override { return in_channels_; }
  int channels() const override { return channels_; }
  Map map(const Image& image) const override {
    auto size = [this](std::int64_t n) { return int((n + kernel_ / 2 * 2 - kernel_) / stride_ + 1); };
    return {image.batch, size(image.height), size(image.width)};
  }

  bool accepts(const Image& image) const override {
    return channels_last_ ? image.stride_channel == 1 && image.stride_column == in_channels_ : image.stride_column == 1;
  }

  void run(const Image& image, void* out) const override {
    const int pad = kernel_ / 2;
    const std::int64_t width = map(image).width, tokens = map(image).tokens();
    const std::size_t wide = patch_width(), norm_wide = row_width(channels_);
    const std::size_t patches_size = row_room(tokens) * wide;
    const std::size_t weights = proj_.data.size() * sizeof(E);
    const bool large_weights = weights > l2_bytes() / 4;
    const bool by_panels =
        large_weights && image.batch < max_threads() && patches_size * sizeof(E) <= max_threads() * l2_bytes() / 2;
    std::ptrdiff_t* offsets;
    E* all_patches;
    float* all_projected;
    std::tie(offsets, all_patches, all_projected) =
        shared_scratch().take(array<std::ptrdiff_t>(pieces()), array<E>(by_panels ? patches_size : 0),
                              array<float>(by_panels ? tokens * norm_wide : 0));
    piece_offsets(image, offsets);
    auto gather_rows = [&](std::int64_t index, int begin, int end, E* patches) {
      for (std::int64_t token = begin; token < end; ++token, patches += wide)
        gather(image, index, token / width * stride_ - pad, token % width * stride_ - pad, offsets, patches);
    };
    auto finish_rows = [&](std::int64_t index, int begin, int end, const float* projected) {
      T* to = static_cast<T*>(out) + (index * tokens + begin) * channels_;
      NormRows<float, T> rows(norm_, channels_);
      for (int r = 0; r < end - begin; ++r) rows.add(projected + r * norm_wide, to + std::ptrdiff_t(r) * channels_);
    };
    if (by_panels) {  // so that every weight is read once
      const Split rows = split_rows(1, tokens, 8, 16);
      for (std::int64_t index = 0; index < image.batch; ++index) {
        parallel_for(rows.tiles, [&](std::int64_t item) {
          const auto tile = rows.tile(item);
          gather_rows(index, tile.begin, tile.end, all_patches + tile.begin * wide);
        });
        for_panels(1, proj_, int(tokens), 1, [&](int p, std::int64_t, Split::Tile cut, int) {
          gemm_panel(rows_of(all_patches, cut.begin, wide), cut.rows(), proj_.panel(p), p * kPanel,
                     store_rows(all_projected + cut.begin * norm_wide, norm_wide, proj_.bias.data()));
        });
        parallel_for(rows.tiles, [&](std::int64_t item) {
          const auto tile = rows.tile(item);
          finish_rows(index, tile.begin, tile.end, all_projected + tile.begin * norm_wide);
        });
      }
      return;
    }
    const std::size_t row_bytes = wide * sizeof(E) + norm_wide * sizeof(float);
    const std::int64_t most = std::clamp<std::int64_t>(l2_bytes() / 4 / row_bytes, large_weights ? 64 : 24, 96);
    const Split split = split_rows(image.batch, tokens, kLeastRows, most, kRowStep);
    parallel_for(image.batch * split.tiles, [&](std::int64_t item) {
      const MatrixUnit unit;
      const auto tile = split.tile(item);
      const auto [patches, projected] =
          thread_scratch().take(array<E>(row_room(tile.rows()) * wide), array<float>(tile.rows() * norm_wide));
      gather_rows(tile.image, tile.begin, tile.end, patches);
      gemm(rows_of(patches, 0, wide), tile.rows(), proj_, store_rows(projected, norm_wide, proj_.bias.data()));
      finish_rows(tile.image, tile.begin, tile.end, projected);
    });
  }

 private:
  std::size_t patch_width() const { return row_width(kernel_ * kernel_ * in_channels_); }

  // A patch is copied in pieces that are dense in the image: a patch row of all channels (channels last), or of one
  // channel.
  int pieces() const { return kernel_ * (channels_last_ ? 1 : in_channels_); }
  int piece_length() const { return kernel_ * (channels_last_ ? in_channels_ : 1); }

  // Where they begin in the image, from the patch's upper left corner.
  void piece_offsets(const Image& image, std::ptrdiff_t* offsets) const {
    const int channels = pieces() / kernel_;
    for (int i = 0; i < pieces(); ++i)
      offsets[i] = i / channels * image.stride_row + i % channels * image.stride_channel;
  }

  // The patch whose upper left corner is (y0, x0), zero outside the image.
  void gather(const Image& image, std::int64_t index, std::int64_t y0, std::int64_t x0, const std::ptrdiff_t* offsets,
              E* row) const {
    const std::ptrdiff_t corner = index * image.stride_batch + y0 * image.stride_row + x0 * image.stride_column;
    const T* from = static_cast<const T*>(image.data) + corner;
    const int count = pieces(), length = piece_length();
    E* to = row;
    if (y0 >= 0 && x0 >= 0 && y0 + kernel_ <= image.height && x0 + kernel_ < image.width) {
      if (length == 7) {  // one element more is there, and the next piece takes its place: one vector
        for (int i = 0; i < count - 1; ++i, to += 7) copy(from + offsets[i], to, 8);
        copy(from + offsets[count - 1], to, 7);  // the next row may be another thread's
        to += 7;
      } else {
        for (int i = 0; i < count; ++i, to += length) copy(from + offsets[i], to, length);
      }
    } else {
      const int unit = length / kernel_, channels = count / kernel_;
      const int left = int(std::clamp<std::int64_t>(-x0, 0, kernel_)) * unit;
      const int right = int(std::clamp<std::int64_t>(image.width - x0, 0, kernel_)) * unit;
      for (int i = 0; i < count; ++i, to += length) {
        const std::int64_t y = y0 + i / channels;
        std::fill(to, to + length, E{});
        if (y >= 0 && y < image.height && left < right) copy(from + offsets[i] + left, to + left, right - left);
      }
    }
    std::fill(to, row + patch_width(), E{});
  }

  static PVT_INLINE void copy(const T* from, E* to, int count) {
    if constexpr (std::is_same_v<T, E>) {
      std::memcpy(to, from, count * sizeof(T));
    } else {
      for (int i = 0; i < count; ++i) assign(to[i], to_float(from[i]));
    }
  }

  int in_channels_, channels_, kernel_, stride_;
  bool channels_last_;
  PackedMatrix<E> proj_;
  PackedNorm norm_;
};
