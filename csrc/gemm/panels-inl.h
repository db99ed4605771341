// Whole products, and products shared out by panels of the weights and by rows.
// Compiled once per ISA: included by isa/kernels-inl.h, which says how.

// out = epilogue(a * b), a (rows, >= depth).
template <class E, class Out>
void gemm(const Rows<E>& a, int rows, const PackedMatrix<E>& b, const Epilogue<Out>& epilogue) {
  for (int p = 0; p < b.panels(); ++p) gemm_panel(a, rows, b.panel(p), p * kPanel, epilogue);
}

// Rows of a thread's own that make it worth reading all weights for them: below, every weight had better be read once.
// What a thread reads is best what it wrote before: between cores that share no cache it takes far longer.
constexpr int kRowsOfOwn = 64;

// Products below this many operations (a few microseconds) stay with the calling thread.
constexpr double kMinFlops = 1e6;

// body(panel, image, cut of `rows` rows, part of k) for all of them: a panel's together and in it a part's, or an
// image's together and in it a cut's, where threads have rows enough of their own.
template <class E, class Body>
void for_panels(std::int64_t images, const PackedMatrix<E>& weights, int rows, int parts, const Body& body) {
  const std::int64_t panels = std::int64_t{weights.panels()} * parts, threads = max_threads();
  const auto run = [&](std::int64_t panel, std::int64_t image, const Split::Tile& cut) {
    const MatrixUnit unit;
    body(int(panel) / parts, image, cut, int(panel) % parts);
  };
  const double flops = 2.0 * images * rows * weights.layout.depth * weights.layout.columns;
  if (flops < kMinFlops) {
    for (std::int64_t panel = 0; panel < panels; ++panel)
      for (std::int64_t image = 0; image < images; ++image) run(panel, image, {image, 0, rows});
  } else if (images >= threads || images * rows >= threads * kRowsOfOwn) {
    const Split cuts = split_rows(images, rows, kRowsOfOwn / 2, rows, kRowStep);
    parallel_for(images * cuts.tiles, [&](std::int64_t item) {
      const auto cut = cuts.tile(item);
      for (std::int64_t panel = 0; panel < panels; ++panel) run(panel, cut.image, cut);
    });
  } else {
    const Split cuts = split_rows(images * panels, rows, kMinRows, rows, kRowStep);
    parallel_for(panels * images * cuts.tiles, [&](std::int64_t item) {
      const auto cut = cuts.tile(item);
      run(cut.image / images, cut.image % images, cut);
    });
  }
}

// body(first row, count, panel) for panels of [begin, end): as many rows of the first operand, of `depth` elements
// each, at a time as stay in cache for all panels.
template <class E, class Body>
void for_rows_and_panels(int rows, std::size_t depth, int begin, int end, const Body& body) {
  constexpr std::size_t kStep = 48;  // whole tiles, on most ISAs
  const int most = int(std::max(kStep, l2_bytes() / 4 / (depth * sizeof(E)) / kStep * kStep));
  for (int first = 0; first < rows; first += most)
    for (int panel = begin; panel < end; ++panel) body(first, std::min(most, rows - first), panel);
}
