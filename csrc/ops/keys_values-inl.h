// Keys and values of some images, and what queries make of them.
// Compiled once per ISA: included by isa/kernels-inl.h, which says how.

// Each head of each image has its keys (width x keys) and values (keys x width) packed as right-hand sides of the
// products to come.
template <class E>
struct KeysValues {
  KeysValues(const Heads& heads, int keys) : heads(heads), keys(keys), k(heads.width, keys), v(keys, heads.width) {}

  std::size_t score_width() const { return k.columns; }
  // What one head's scores of `rows` queries take, and their probabilities.
  Array<float> scores(int rows) const { return array<float>(rows * score_width()); }
  Array<E> probabilities(int rows) const { return array<E>(row_room(rows) * score_width()); }

  // Columns [column, column + width) of the product that gives keys and values, for the keys of `cut`, into the packed
  // matrices. Keys past the last one become zero: they poison neither the scores nor the product with zero
  // probabilities.
  void pack_columns(std::int64_t image, int column, int width, const E* rows, Split::Tile cut) const {
    constexpr int kStep = kDepthStep<E> == 1 ? 1 : 2;  // between neighbouring columns of a packed matrix
    const bool last = cut.end == keys;
    for (int i = 0, count; i < width; i += count) {  // columns of one matrix, within a panel of its layout
      // a head's key and value lie side by side
      const int n = (column + i) % heads.width;
      count = std::min({width - i, heads.width - n, kPanel - n % kPanel});
      const std::int64_t head = image * heads.count + (column + i) / heads.width / 2;
      const E* from = rows + i;
      if ((column + i) / heads.width % 2 == turned) {
        E* to_key = all_k + head * k.size();
        const int end = last ? k.columns : cut.end;
        for (int start = cut.begin, stop; start < end; start = stop) {
          stop = std::min(end, (start / kPanel + 1) * kPanel);
          for (int c = 0; c < count; ++c) {
            E* to = to_key + k.index(n + c, start);
            for (int key = start; key < std::min(stop, cut.end); ++key, to += kStep)
              *to = from[(key - cut.begin) * width + c];
            for (int key = std::max(start, cut.end); key < stop; ++key, to += kStep) *to = E{};
          }
        }
      } else {
        E* to_value = all_v + head * v.size();
        const int end = last ? v.depth : cut.end;
        for (int key = cut.begin; key < end; ++key) {
          E* to = to_value + v.index(key, n);
          const E* row = from + (key - cut.begin) * width;
          for (int c = 0; c < count; ++c) to[c * kStep] = key < cut.end ? row[c] : E{};
        }
      }
    }
  }

  // softmax(q k^T) v of one head for `rows` queries, which carry the scale; rows of `queries` and `values` hold all
  // heads.
  void attend(std::int64_t image, int head, int rows, const E* queries, float* scores, E* probabilities,
              E* values) const {
    const std::size_t width = score_width();
    const std::int64_t matrix = image * heads.count + head;
    for (int p = 0; p < k.panels(); ++p)
      gemm_panel(rows_of(queries + head * heads.width, 0, heads.inner()), rows, k.panel(all_k + matrix * k.size(), p),
                 p * kPanel, store_rows(scores, width, zeros));
    softmax_rows(scores, rows, keys, int(width), probabilities);
    Epilogue<E> to_values = store_rows(values + head * heads.width, heads.inner(), zeros);
    to_values.columns = heads.width;
    for (int p = 0; p < v.panels(); ++p)
      gemm_panel(rows_of(probabilities, 0, width), rows, v.panel(all_v + matrix * v.size(), p), p * kPanel, to_values);
  }

  Heads heads;
  int keys;             // of an image
  PanelLayout<E> k, v;  // of one head
  int turned = 0;       // which of a head's two is packed as keys are: 1 for what the gradients want
  E *all_k = nullptr, *all_v = nullptr;
  float* zeros = nullptr;  // the bias of products that have none: as wide as scores and heads
};
