// Products shared out by panels of the weights, so that every weight is read once.

// body(panel, image, cut of `rows` rows, part of k) for all of them, a panel's together, and in it a part's.
template <class E, class Body>
void for_panels(std::int64_t images, const PackedMatrix<E>& weights, int rows, int parts, const Body& body) {
  const std::int64_t panels = std::int64_t{weights.panels()} * parts;
  const Split cuts = split_rows(images * panels, rows, kLeastRows, rows, kRowStep);
  parallel_for(panels * images * cuts.tiles, [&](std::int64_t item) {
    const MatrixUnit unit;
    const auto cut = cuts.tile(item);
    const int panel = int(cut.image / images);
    body(panel / parts, cut.image % images, cut, panel % parts);
  });
}
