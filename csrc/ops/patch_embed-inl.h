// Overlap patch embed: LayerNorm of a convolution's tokens.
// Compiled once per ISA: included by isa/kernels-inl.h, which says how.

template <class T, class E>
class PatchEmbedOp final : public PatchEmbed {
 public:
  PatchEmbedOp(const PatchEmbedWeights& w, bool channels_last)
      : in_channels_(w.in_channels),
        channels_(w.channels),
        patches_(w.in_channels, w.kernel, w.stride, channels_last),
        proj_(pack_conv<E, T>(w.proj, w.channels, {w.in_channels, w.kernel, channels_last, w.in_channels})),
        norm_(w.norm, w.channels) {}

  int in_channels() const override { return in_channels_; }
  int channels() const override { return channels_; }
  Map map(const Image& image) const override { return patches_.map(image); }
  bool accepts(const Image& image) const override { return patches_.accepts(image); }

  void run(const Image& image, void* out) const override {
    const std::int64_t tokens = map(image).tokens();
    const bool fits = row_room(tokens) * patches_.width() * sizeof(E) <= max_threads() * l2_bytes() / 2;
    if (large_weights() && image.batch < max_threads() && fits)
      run_panels(image, tokens, static_cast<T*>(out));
    else
      run_tiles(image, tokens, static_cast<T*>(out));
  }

 private:
  bool large_weights() const { return proj_.data.size() * sizeof(E) > l2_bytes() / 4; }
  std::size_t projected_width() const { return row_width(channels_); }

  // Tiles of tokens, from patches to the output.
  void run_tiles(const Image& image, std::int64_t tokens, T* out) const {
    std::ptrdiff_t* offsets = std::get<0>(shared_scratch().take(array<std::ptrdiff_t>(patches_.pieces())));
    patches_.piece_offsets(image, offsets);
    const std::size_t row_bytes = patches_.width() * sizeof(E) + projected_width() * sizeof(float);
    const std::int64_t max_rows = std::clamp<std::int64_t>(l2_bytes() / 4 / row_bytes, large_weights() ? 64 : 24, 96);
    const Split split = split_rows(image.batch, tokens, kMinRows, max_rows, kRowStep);
    parallel_for(image.batch * split.tiles, [&](std::int64_t item) {
      const MatrixUnit unit;
      const auto tile = split.tile(item);
      const auto [patches, projected] = thread_scratch().take(array<E>(row_room(tile.rows()) * patches_.width()),
                                                              array<float>(tile.rows() * projected_width()));
      patches_.gather(image, offsets, tile, patches);
      gemm(rows_of(patches, 0, patches_.width()), tile.rows(), proj_, to_projected(projected));
      norm_rows<Activation::none>(norm_, projected, projected_width(), tile.rows(),
                                  out + (tile.image * tokens + tile.begin) * channels_, channels_);
    });
  }

  // Panels of the weights, an image at a time, so that every weight is read once for it.
  void run_panels(const Image& image, std::int64_t tokens, T* out) const {
    std::ptrdiff_t* offsets;
    E* patches;
    float* projected;
    std::tie(offsets, patches, projected) =
        shared_scratch().take(array<std::ptrdiff_t>(patches_.pieces()), array<E>(row_room(tokens) * patches_.width()),
                              array<float>(tokens * projected_width()));
    patches_.piece_offsets(image, offsets);
    const Split rows = split_rows(1, tokens, 8, 16);
    for (std::int64_t index = 0; index < image.batch; ++index) {
      parallel_for(rows.tiles, [&](std::int64_t item) {
        auto tile = rows.tile(item);
        tile.image = index;
        patches_.gather(image, offsets, tile, patches + tile.begin * patches_.width());
      });
      for_panels(1, proj_, int(tokens), 1, [&](int p, std::int64_t, Split::Tile cut, int) {
        gemm_panel(rows_of(patches, cut.begin, patches_.width()), cut.rows(), proj_.panel(p), p * kPanel,
                   to_projected(projected + cut.begin * projected_width()));
      });
      parallel_for(rows.tiles, [&](std::int64_t item) {
        const auto tile = rows.tile(item);
        norm_rows<Activation::none>(norm_, projected + tile.begin * projected_width(), projected_width(), tile.rows(),
                                    out + (index * tokens + tile.begin) * channels_, channels_);
      });
    }
  }

  Epilogue<float> to_projected(float* projected) const {
    return store_rows(projected, projected_width(), proj_.bias.data());
  }

  int in_channels_, channels_;
  Patches<T, E> patches_;
  PackedMatrix<E> proj_;
  PackedNorm norm_;
};
