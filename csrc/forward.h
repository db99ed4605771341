// A model's forward: its ops in order, from the image to the logits.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "memory.h"

namespace pvt {

struct Stage {
  const PatchEmbed* embed;
  int kernel, stride, channels;
  std::vector<const ResidualOp*> blocks;  // attention and MLP by turns
  const LayerNorm* norm;

  Map map(const Image& image) const {
    auto size = [this](std::int64_t n) { return int((n + kernel / 2 * 2 - kernel) / stride + 1); };
    return {image.batch, size(image.height), size(image.width)};
  }
};

// The ops belong to the caller. Maps between them live in two buffers of the calling thread, which stay.
class Forward {
 public:
  Forward(std::vector<Stage> stages, const Head& head, std::size_t element_size)
      : stages_(std::move(stages)), head_(head), element_size_(element_size) {}

  void run(Image image, void* out) const {
    std::size_t largest = 0;
    Image next = image;
    for (const Stage& stage : stages_) {
      const Map map = stage.map(next);
      largest = std::max(largest, std::size_t(map.batch * map.tokens() * stage.channels) * element_size_);
      next = tokens_of(nullptr, map, stage.channels);
    }
    thread_local Scratch scratch;
    scratch.reset(2 * Scratch::bytes_for<char>(largest));
    char* x = scratch.take<char>(largest);
    char* y = scratch.take<char>(largest);
    for (const Stage& stage : stages_) {
      const Map map = stage.map(image);
      stage.embed->run(image, stage.stride, x);
      for (const ResidualOp* op : stage.blocks) {
        op->run(x, map, nullptr, y);
        std::swap(x, y);
      }
      stage.norm->run(x, map.batch * map.tokens(), y);
      image = tokens_of(y, map, stage.channels);
    }
    head_.run(image.data, image.batch, image.height * image.width, out);
  }

 private:
  static Image tokens_of(const void* tokens, const Map& map, std::int64_t channels) {
    return {tokens, map.batch, map.height, map.width, map.tokens() * channels, 1, map.width * channels, channels};
  }

  std::vector<Stage> stages_;
  const Head& head_;
  std::size_t element_size_;
};

}  // namespace pvt
