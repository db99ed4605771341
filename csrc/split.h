// How the rows of a batch of images are cut into work items.
#pragma once

#include <algorithm>
#include <cstdint>

#include "parallel.h"

namespace pvt {

// Every image's rows in `tiles` nearly equal tiles of at most `rows` rows; items count through all images.
struct Split {
  std::int64_t tiles, rows, total;

  struct Tile {
    std::int64_t image, begin, end;
  };
  Tile tile(std::int64_t item) const {
    const std::int64_t image = item / tiles, begin = item % tiles * rows;
    return {image, begin, std::min(begin + rows, total)};
  }
};

// Tiles of at most max_rows; when there are few, as many as give each thread the same number.
inline Split split_rows(std::int64_t batch, std::int64_t rows, std::int64_t max_rows) {
  const std::int64_t threads = max_threads();
  std::int64_t tiles = (rows + max_rows - 1) / max_rows;
  if (batch * tiles < 4 * threads)
    while (batch * tiles % threads != 0 && tiles < rows) ++tiles;
  const std::int64_t height = (rows + tiles - 1) / tiles;
  return {(rows + height - 1) / height, height, rows};
}

}  // namespace pvt
