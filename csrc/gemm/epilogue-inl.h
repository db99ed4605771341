// What becomes of a product's sums before they are stored.
// Compiled once per ISA: included by gemm/tile-inl.h or gemm/amx-inl.h.

PVT_INLINE void assign(float& to, float value) { to = value; }
PVT_INLINE void assign(bf16& to, float value) { store_first(&to, splat(value), 1); }

template <int kRows, int kVectors, class Body>
PVT_INLINE void for_each(const Vec (&)[kRows][kVectors], const Body& body) {
  unrolled<kRows>([&](auto r) PVT_LAMBDA { unrolled<kVectors>([&](auto i) PVT_LAMBDA { body(r, i); }); });
}

// What happens to a sum, bias added, before it is stored: * multiply, ReLU, residual + scale * it.
template <class Out>
struct Epilogue {
  Out* out;                     // of row 0, column 0
  std::ptrdiff_t ld;            // elements between rows
  const int* places = nullptr;  // of the rows, where they are not stored in order
  int columns;                  // stored columns; the rest of the last panel is dropped
  const float* bias;
  float multiply = 1;
  bool relu = false;
  const Out* residual = nullptr;  // laid out as `out`
  float residual_scale = 1;

  PVT_INLINE std::ptrdiff_t place(int row) const { return (places ? places[row] : row) * ld; }

  // Rows from `row` on and columns from `column` on of the product. One branch for all rows, and nothing that calls a
  // function while sums wait in registers.
  template <int kRows, int kVectors>
  PVT_INLINE void finish(int row, int column, const Vec (&sums)[kRows][kVectors]) const {
    if (__builtin_expect(columns - column < kVectors * kLanes, 0)) {
      float waiting[kRows][kVectors * kLanes];
      for_each(sums, [&](auto r, auto i) PVT_LAMBDA { store(waiting[r] + i * kLanes, sums[r][i]); });
      for (int r = 0; r < kRows; ++r) finish_some(row + r, column, waiting[r]);
    } else if (residual) {
      for_each(sums, [&](auto r, auto i) PVT_LAMBDA {
        const std::ptrdiff_t at = place(row + r) + column + i * kLanes;
        store(out + at, load(residual + at) + finished(sums[r][i]) * residual_scale);
      });
    } else if (relu || multiply != 1) {
      for_each(sums, [&](auto r, auto i)
                         PVT_LAMBDA { store(out + place(row + r) + column + i * kLanes, finished(sums[r][i])); });
    } else {
      for_each(sums, [&](auto r, auto i) PVT_LAMBDA { store(out + place(row + r) + column + i * kLanes, sums[r][i]); });
    }
  }

  // The columns from `column` on, too few for a tile.
  __attribute__((noinline)) void finish_some(int row, int column, const float* sums) const {
    for (; column < columns; column += kLanes, sums += kLanes) {
      const int count = std::min(kLanes, columns - column);
      const std::ptrdiff_t at = place(row) + column;
      Vec x = finished(load(sums));
      if (residual) x = load_first(residual + at, count) + x * residual_scale;
      store_first(out + at, x, count);
    }
  }

  // Is storing all that happens to columns up to `end`?
  bool plain(int end) const { return !places && !relu && !residual && multiply == 1 && end <= columns; }

  PVT_INLINE Vec finished(Vec v) const {
    if (multiply != 1) v *= multiply;
    return relu ? max(Vec{}, v) : v;  // in this order: NaN stays NaN
  }
};

// Rows of `ld` columns, all stored.
template <class Out>
Epilogue<Out> store_rows(Out* out, std::size_t ld, const float* bias) {
  Epilogue<Out> epilogue{};
  epilogue.out = out;
  epilogue.ld = ld;
  epilogue.columns = int(ld);
  epilogue.bias = bias;
  return epilogue;
}

// residual + scale * rows of `columns` columns, all dense.
template <class Out>
Epilogue<Out> add_rows(Out* out, const Out* residual, float scale, int columns, const float* bias) {
  Epilogue<Out> epilogue = store_rows(out, columns, bias);
  epilogue.residual = residual;
  epilogue.residual_scale = scale;
  return epilogue;
}
