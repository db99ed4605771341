// How the rows of a batch of images are cut into work items.
#pragma once

#include <algorithm>
#include <cstdint>

#include "runtime/parallel.h"

namespace pvt {

// Items per thread that even out threads of different speed.
constexpr int kItemsPerThread = 4;

// Every image's rows in `tiles` tiles of nearly equal height, in whole steps; items count through all images.
struct Split {
  std::int64_t tiles, rows, step;

  struct Tile {
    std::int64_t image;
    int begin, end;
    int rows() const { return end - begin; }
  };
  Tile tile(std::int64_t item) const { return {item / tiles, begin(item % tiles), begin(item % tiles + 1)}; }

 private:
  int begin(std::int64_t i) const { return int(std::min(rows, (i * rows / tiles + step - 1) / step * step)); }
};

// Tiles of at most `most` rows; of fewer, but not fewer than `least`, where there would be too few items otherwise, or
// not as many for each thread.
inline Split split_rows(std::int64_t images, std::int64_t rows, std::int64_t min_rows, std::int64_t max_rows,
                        std::int64_t step = 1) {
  const std::int64_t threads = max_threads(), items = threads == 1 ? 1 : kItemsPerThread * threads;
  const std::int64_t wanted = images > 0 ? (items + images - 1) / images : 1;
  std::int64_t tiles = std::max({std::int64_t{1}, (rows + max_rows - 1) / max_rows, std::min(wanted, rows / min_rows)});
  while (images * tiles % threads != 0 && images * tiles < 4 * items && tiles < rows / min_rows) ++tiles;
  return {tiles, rows, step};
}

// Rows of `elements` each for work like LayerNorm, in tiles of enough elements (half a microsecond) to be worth handing
// to a thread: a small map stays with the calling one.
inline Split split_light(std::int64_t images, std::int64_t rows, std::int64_t elements) {
  constexpr std::int64_t kMinElements = 1 << 12;
  const std::int64_t max_rows = std::max<std::int64_t>(rows, 1);
  return split_rows(images, rows, (kMinElements + elements - 1) / elements, max_rows);
}

}  // namespace pvt
