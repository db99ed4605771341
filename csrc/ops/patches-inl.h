// The patches of an image that a convolution multiplies, as rows.
// Compiled once per ISA: included by isa/kernels-inl.h, which says how.

// A patch is copied in pieces that are dense in the image: a patch row of all channels (channels last), or of one
// channel.
template <class T, class E>
class Patches {
 public:
  Patches(int in_channels, int kernel, int stride, bool channels_last)
      : in_channels_(in_channels), kernel_(kernel), stride_(stride), channels_last_(channels_last) {}

  // How many there are along a side of n pixels.
  int count(std::int64_t n) const { return int((n + kernel_ / 2 * 2 - kernel_) / stride_ + 1); }
  Map map(const Image& image) const { return {image.batch, count(image.height), count(image.width)}; }

  bool accepts(const Image& image) const {
    return channels_last_ ? image.stride_channel == 1 && image.stride_column == in_channels_ : image.stride_column == 1;
  }

  std::size_t width() const { return row_width(kernel_ * kernel_ * in_channels_); }
  int pieces() const { return kernel_ * (channels_last_ ? 1 : in_channels_); }

  // Where the pieces begin in the image, from the patch's upper left corner.
  void piece_offsets(const Image& image, std::ptrdiff_t* offsets) const {
    const int channels = pieces() / kernel_;
    for (int i = 0; i < pieces(); ++i)
      offsets[i] = i / channels * image.stride_row + i % channels * image.stride_channel;
  }

  // Rows of the patches of `cut`, an image's.
  void gather(const Image& image, const std::ptrdiff_t* offsets, const Split::Tile& cut, E* rows) const {
    const std::int64_t columns = count(image.width), pad = kernel_ / 2;
    for (std::int64_t patch = cut.begin; patch < cut.end; ++patch, rows += width())
      gather_one(image, offsets, cut.image, patch / columns * stride_ - pad, patch % columns * stride_ - pad, rows);
  }

 private:
  int piece_length() const { return kernel_ * (channels_last_ ? in_channels_ : 1); }

  // The patch whose upper left corner is (y0, x0), zero outside the image.
  void gather_one(const Image& image, const std::ptrdiff_t* offsets, std::int64_t index, std::int64_t y0,
                  std::int64_t x0, E* row) const {
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
    std::fill(to, row + width(), E{});
  }

  static PVT_INLINE void copy(const T* from, E* to, int count) {
    if constexpr (std::is_same_v<T, E>) {
      std::memcpy(to, from, count * sizeof(T));
    } else {
      int i = 0;
      for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
      for (; i < count; ++i) assign(to[i], to_float(from[i]));
    }
  }

  int in_channels_, kernel_, stride_;
  bool channels_last_;
};
