// A model's forward: its ops in order, from the image to the logits.
#pragma once

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "kernels.h"
#include "runtime/memory.h"
#include "runtime/parallel.h"

namespace pvt {

using Op = std::variant<const PatchEmbed*, const ResidualOp*, const LayerNorm*, const Head*>;

// Stages, each a patch embed, residual ops and a norm, then a head. The ops belong to the caller. Maps between them
// live in two buffers of the calling thread, which stay.
class Forward {
 public:
  // std::invalid_argument unless `ops` are stages and a head whose channels fit each other.
  Forward(const std::vector<Op>& ops, std::size_t element_size) : element_size_(element_size) {
    int channels = 0;
    bool open = false;  // within a stage
    for (const Op& op : ops) {
      require(head_ == nullptr, "end with the head");
      if (auto embed = std::get_if<const PatchEmbed*>(&op)) {
        require(!open && (stages_.empty() || (*embed)->in_channels() == channels), "begin stages on the norm before");
        stages_.push_back({*embed, {}, nullptr});
        channels = (*embed)->channels();
        open = true;
      } else if (auto residual = std::get_if<const ResidualOp*>(&op)) {
        require(open && (*residual)->channels() == channels, "have residual ops of their stage's channels");
        stages_.back().ops.push_back(*residual);
      } else if (auto norm = std::get_if<const LayerNorm*>(&op)) {
        require(open && (*norm)->channels() == channels, "have norms of their stage's channels");
        stages_.back().norm = *norm;
        open = false;
      } else {
        head_ = std::get<const Head*>(op);
        require(!open && !stages_.empty() && head_->channels() == channels, "have a head of the last stage's channels");
      }
    }
    require(head_ != nullptr, "end with the head");
  }

  int in_channels() const { return stages_.front().embed->in_channels(); }
  int classes() const { return head_->classes(); }

  // std::invalid_argument, before anything is read, for an image that does not fit.
  void run(Image image, void* out) const {
    std::size_t largest = 0;
    Image next = image;
    for (const Stage& stage : stages_) {
      require(stage.embed->accepts(next), "take an image of these strides");
      const Map map = stage.embed->map(next);
      int min_side = 1;
      for (const ResidualOp* op : stage.ops) min_side = std::max(min_side, op->min_side());
      if (next.height < 1 || next.width < 1 || std::min(map.height, map.width) < min_side) {
        throw std::invalid_argument("Forward: image must give each stage a map of at least its sr_ratio a side, got " +
                                    std::to_string(map.height) + "x" + std::to_string(map.width) + " for " +
                                    std::to_string(min_side) + " from " + std::to_string(image.height) + "x" +
                                    std::to_string(image.width));
      }
      require(fits(map, stage.embed->channels()), "take an image whose maps have fewer than 2^31 elements");
      largest = std::max(largest, std::size_t(map.batch * map.tokens() * stage.embed->channels()) * element_size_);
      next = tokens_of(nullptr, map, stage.embed->channels());
    }
    with_team([&] { run_in_team(image, largest, out); });
  }

 private:
  struct Stage {
    const PatchEmbed* embed;
    std::vector<const ResidualOp*> ops;
    const LayerNorm* norm;
  };

  // largest: bytes of the largest map.
  void run_in_team(Image image, std::size_t largest, void* out) const {
    thread_local Scratch scratch;
    auto [x, y] = scratch.take(array<char>(largest), array<char>(largest));
    for (const Stage& stage : stages_) {
      const Map map = stage.embed->map(image);
      stage.embed->run(image, x);
      for (const ResidualOp* op : stage.ops) {
        op->run(x, map, nullptr, y);
        std::swap(x, y);
      }
      stage.norm->run(x, map.batch * map.tokens(), y);
      image = tokens_of(y, map, stage.embed->channels());
    }
    head_->run(image.data, image.batch, image.height * image.width, out);
  }

  static void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(std::string("Forward: ops must ") + what);
  }

  static Image tokens_of(const void* tokens, const Map& map, std::int64_t channels) {
    return {tokens, map.batch, map.height, map.width, map.tokens() * channels, 1, map.width * channels, channels};
  }

  std::vector<Stage> stages_;
  const Head* head_ = nullptr;
  std::size_t element_size_;
};

}  // namespace pvt
