// The smaller map that keys and values come from. A convolution makes one token of each patch of sr_ratio x sr_ratio,
// and LayerNorm follows. In the linear form average pooling to 7 x 7 comes first, and GELU last.
// Compiled once per ISA: included by isa/kernels-inl.h, which says how.

// An order of a map's tokens in which those of a patch lie together, [patch][dy][dx], before those that fall into no
// patch: the convolution is then a product over rows of whole patches.
struct PatchOrder {
  PatchOrder(const Map& map, int side)
      : side(side), rows(map.height / side), columns(map.width / side), map_width(map.width) {}

  // Where the token of row y and column x lies.
  PVT_INLINE int place(int y, int x) const {
    const int inside = columns * side, outside = map_width - inside, patches = rows * columns * side * side;
    if (y < rows * side && x < inside) return ((y / side * columns + x / side) * side + y % side) * side + x % side;
    if (y < rows * side) return patches + y * outside + x - inside;
    return patches + rows * side * outside + (y - rows * side) * map_width + x;
  }

  int side, rows, columns, map_width;
};

template <class T, class E>
class SpatialReduction {
 public:
  explicit SpatialReduction(const AttentionWeights& w)
      : channels_(w.channels),
        ratio_(w.sr.weight == nullptr ? 1 : w.sr_ratio),
        reduces_(w.sr.weight != nullptr),
        linear_(w.linear) {
    if (!reduces_) return;
    conv_ = pack_conv<E, T>(w.sr, channels_, patch_rows());
    norm_ = PackedNorm(w.sr_norm, channels_);
  }

  // Else keys and values come from the map itself.
  bool reduces() const { return reduces_; }
  bool linear() const { return linear_; }
  int ratio() const { return ratio_; }
  const PackedNorm& norm() const { return norm_; }
  int min_side() const { return linear_ ? 1 : ratio_; }
  int keys(const Map& map) const { return linear_ ? kPool * kPool : (map.height / ratio_) * (map.width / ratio_); }

  PatchRows patch_rows() const { return {channels_, ratio_, true, int(width())}; }
  // Elements of a patch's row.
  std::size_t patch_width() const { return ratio_ * ratio_ * width(); }
  // Of `rows` reduced rows, and of the sums that they come from.
  std::size_t reduced_size(std::size_t rows) const { return reduces_ ? row_room(rows) * width() : 0; }
  std::size_t sums_size(std::size_t rows) const { return reduced_size(rows) * parts(); }

  // From normalised tokens (batch, tokens, width) in PatchOrder to `reduced` (batch, keys, width), by way of `pooled`
  // in the linear form, which may be the same memory, and `sums`: these keep what the norm is taken of.
  template <Activation kGelu = Activation::gelu>
  void run(const Map& map, const E* normed, const float* zeros, float* sums, E* pooled, E* reduced) const {
    if (linear_) pool(map, normed, pooled);
    convolve(map, linear_ ? pooled : normed, zeros, sums);
    const std::int64_t rows = map.batch * keys(map);
    const Split split = split_light(1, rows, width());
    parallel_for(split.tiles, [&](std::int64_t item) {
      const auto tile = split.tile(item);
      float* from = sums + tile.begin * std::ptrdiff_t(width());
      E* to = reduced + tile.begin * std::ptrdiff_t(width());
      fold_parts(from, parts(), rows * width(), tile.rows() * width());
      linear_ ? norm_rows<kGelu>(norm_, from, width(), tile.rows(), to, int(width()))
              : norm_rows<Activation::none>(norm_, from, width(), tile.rows(), to, int(width()));
    });
  }

  // Adds to the gradient of normalised tokens what that of the pooled ones, (batch, keys, width), gives.
  void unpool(const Map& map, const float* pooled, float* normed) const {
    parallel_for(map.batch * map.height, [&](std::int64_t item) {
      const int y = int(item % map.height);
      const float* from = pooled + item / map.height * kPool * kPool * width();
      for (int bin = 0; bin < kPool * kPool; ++bin) {
        const Bin at(bin, map);
        if (y < at.y0 || y >= at.y1) continue;
        for (int x = at.x0; x < at.x1; ++x) {
          float* to = normed + (item * map.width + x) * width();
          for (std::size_t i = 0; i < width(); i += kLanes)
            store(to + i, load(to + i) + load(from + bin * width() + i) * at.share());
        }
      }
    });
  }

 private:
  static constexpr int kPool = 7;

  // What torch's adaptive pooling takes the mean of: bins overlap where 7 does not divide.
  struct Bin {
    Bin(int index, const Map& map) {
      const int y = index / kPool, x = index % kPool;
      y0 = y * map.height / kPool, y1 = ((y + 1) * map.height + kPool - 1) / kPool;
      x0 = x * map.width / kPool, x1 = ((x + 1) * map.width + kPool - 1) / kPool;
    }
    float share() const { return 1.0f / ((y1 - y0) * (x1 - x0)); }
    int y0, y1, x0, x1;
  };
  static constexpr int kPartDepth = 1024;

  std::size_t width() const { return row_width(channels_); }
  int parts() const { return (conv_.layout.depth + kPartDepth - 1) / kPartDepth; }

  // The means of normalised tokens.
  void pool(const Map& map, const E* normed, E* pooled) const {
    parallel_for(map.batch * kPool * kPool, [&](std::int64_t item) {
      const Bin bin(int(item % (kPool * kPool)), map);
      const E* from = normed + item / (kPool * kPool) * map.tokens() * width();
      for (std::size_t i = 0; i < width(); i += kLanes) {
        Vec total{};
        for (int row = bin.y0; row < bin.y1; ++row) {
          Vec some{};
          for (int column = bin.x0; column < bin.x1; ++column)
            some += load(from + (std::int64_t(row) * map.width + column) * width() + i);
          total += some;
        }
        store(pooled + item * width() + i, total * bin.share());
      }
    });
  }

  // Few rows and columns, long sums: these are shared out too, in parts that do not depend on the threads. `sums` is
  // (parts, batch, keys, width).
  void convolve(const Map& map, const E* patches, const float* zeros, float* sums) const {
    const int count = keys(map);
    const std::size_t image_size = (linear_ ? count : map.tokens()) * width();
    const std::ptrdiff_t part_size = map.batch * count * width();
    for_panels(map.batch, conv_, count, parts(), [&](int p, std::int64_t image, Split::Tile cut, int part) {
      const int begin = part * kPartDepth, end = std::min(begin + kPartDepth, conv_.layout.depth);
      Rows<E> a = rows_of(patches + image * image_size, cut.begin, patch_width());
      a.data += begin;
      float* to = sums + part * part_size + (image * count + cut.begin) * width();
      gemm_panel(a, cut.rows(), conv_.panel(p).part(begin, end), p * kPanel,
                 store_rows(to, width(), part == 0 ? conv_.bias.data() : zeros));
    });
  }

  int channels_, ratio_;
  bool reduces_, linear_;
  PackedMatrix<E> conv_;
  PackedNorm norm_;
};
