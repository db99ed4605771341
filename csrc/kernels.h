// What the kernels offer to their callers: one class per op that owns packed weights, and a table of factories per
// instruction set. Raw pointers in, no torch, no Python.
//
// Activations are dense channels-last tokens (batch, height * width, channels) in the element type of `DType`, and
// matrices and kernels come in torch's layouts in the same element type; norms and biases are float. A packed op is
// made by one ISA's table and runs that ISA's code only; running it is thread-safe.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace pvt {

// Element types of activations, and the bytes that an element of each takes. mixed: float, while the operands of
// products are rounded to bf16, where an ISA multiplies that; elsewhere it is f32.
enum class DType { f32, bf16, mixed };
constexpr std::size_t kElementSizes[] = {4, 2, 4};
constexpr int kDTypes = sizeof kElementSizes / sizeof *kElementSizes;
constexpr std::size_t element_size(DType dtype) { return kElementSizes[int(dtype)]; }

struct Norm {
  const float* weight;  // (channels)
  const float* bias;    // (channels)
  float eps;
};

struct Linear {
  const void* weight;  // (out, in) or (out, in, kernel, kernel)
  const float* bias;   // (out), or null for none
};

struct PatchEmbedWeights {
  Linear proj;  // (channels, in_channels, kernel, kernel)
  Norm norm;
  int in_channels, channels, kernel, stride;
};

struct AttentionWeights {
  Norm norm;
  Linear q, kv;  // (channels, channels), (2 channels, channels): keys' rows first
  Linear sr;     // (channels, channels, sr_ratio, sr_ratio), or weight null where keys come from the map itself
  Norm sr_norm;
  Linear proj;  // (channels, channels)
  int channels, heads, sr_ratio;
  bool linear;  // average pooling to 7x7 before sr, GELU after sr_norm
  float scale;  // of the scores
};

struct MlpWeights {
  Norm norm;
  Linear fc1, dwconv, fc2;  // (hidden, channels), (hidden, 1, 3, 3), (channels, hidden)
  int channels, hidden;
  bool relu;  // between fc1 and the depthwise convolution
};

// A strided image; strides in elements.
struct Image {
  const void* data;
  std::int64_t batch, height, width;
  std::int64_t stride_batch, stride_channel, stride_row, stride_column;
};

// Dense tokens of a map.
struct Map {
  std::int64_t batch;
  int height, width;
  std::int64_t tokens() const { return std::int64_t{height} * width; }
};

// What the kernels' arithmetic with int is for: sides of images and maps, elements of one image's map, rows.
constexpr std::int64_t kMaxSide = 1 << 20, kMaxElements = std::int64_t{1} << 31;
inline bool fits(const Map& map, std::int64_t channels) {
  return std::max(map.height, map.width) <= kMaxSide && map.tokens() < kMaxElements / channels &&
         map.batch <= kMaxElements / std::max<std::int64_t>(map.tokens(), 1);
}

struct PatchEmbed {
  virtual ~PatchEmbed() = default;
  virtual int in_channels() const = 0;
  virtual int channels() const = 0;
  virtual Map map(const Image& image) const = 0;  // of the tokens it makes
  // The image's channels must be dense in its innermost one or two dimensions: `accepts` tells.
  virtual bool accepts(const Image& image) const = 0;
  virtual void run(const Image& image, void* out) const = 0;
};

// x + residual_scale * op(x); residual_scale is (batch) or null for 1. `out` may not overlap `x`.
struct ResidualOp {
  virtual ~ResidualOp() = default;
  virtual int channels() const = 0;
  virtual int min_side() const = 0;  // the fewest rows and columns of a map that it takes
  virtual void run(const void* x, Map map, const void* residual_scale, void* out) const = 0;
};

// Gradients of an op by its input and by its weights: sizes() are the elements of each weight's gradient, a weight and
// its bias for each field of the op's weights that may have them; `grads` as many addresses of floats, in torch's
// layouts; null, as the input's may be, where one is not wanted. Gradients of activations are as activations are.

// grad_image: dense, channels last if the image is packed so.
struct PatchEmbedGradients {
  virtual ~PatchEmbedGradients() = default;
  virtual int in_channels() const = 0;
  virtual int channels() const = 0;
  virtual Map map(const Image& image) const = 0;
  virtual bool accepts(const Image& image) const = 0;
  virtual std::vector<std::size_t> sizes() const = 0;
  virtual void run(const Image& image, const void* grad_out, void* grad_image, float* const* grads) const = 0;
};

struct ResidualGradients {
  virtual ~ResidualGradients() = default;
  virtual int channels() const = 0;
  virtual int min_side() const = 0;
  virtual std::vector<std::size_t> sizes() const = 0;
  virtual void run(const void* x, Map map, const void* residual_scale, const void* grad_out, void* grad_x,
                   float* const* grads) const = 0;
};

// LayerNorm of rows.
struct LayerNorm {
  virtual ~LayerNorm() = default;
  virtual int channels() const = 0;
  virtual void run(const void* x, std::int64_t rows, void* out) const = 0;
};

// Mean over tokens, then the classifier, if there is one: else `classes` is `channels`.
struct Head {
  virtual ~Head() = default;
  virtual int channels() const = 0;
  virtual int classes() const = 0;
  virtual void run(const void* x, std::int64_t batch, std::int64_t tokens, void* out) const = 0;
};

struct LayerNormGradients {
  virtual ~LayerNormGradients() = default;
  virtual int channels() const = 0;
  virtual std::vector<std::size_t> sizes() const = 0;
  virtual void run(const void* x, std::int64_t rows, const void* grad_out, void* grad_x, float* const* grads) const = 0;
};

struct HeadGradients {
  virtual ~HeadGradients() = default;
  virtual int channels() const = 0;
  virtual int classes() const = 0;
  virtual std::vector<std::size_t> sizes() const = 0;
  virtual void run(const void* x, std::int64_t batch, std::int64_t tokens, const void* grad_out, void* grad_x,
                   float* const* grads) const = 0;
};

// One instruction set's factories for one element type.
struct Factories {
  std::unique_ptr<PatchEmbed> (*patch_embed)(const PatchEmbedWeights&, bool channels_last);
  std::unique_ptr<ResidualOp> (*attention)(const AttentionWeights&);
  std::unique_ptr<ResidualOp> (*mlp)(const MlpWeights&);
  std::unique_ptr<LayerNorm> (*layer_norm)(const Norm&, int channels);
  std::unique_ptr<Head> (*head)(const Linear& classifier, int channels, int classes);
  std::unique_ptr<PatchEmbedGradients> (*patch_embed_gradients)(const PatchEmbedWeights&, bool channels_last);
  std::unique_ptr<ResidualGradients> (*attention_gradients)(const AttentionWeights&);
  std::unique_ptr<ResidualGradients> (*mlp_gradients)(const MlpWeights&);
  std::unique_ptr<LayerNormGradients> (*layer_norm_gradients)(const Norm&, int channels);
  std::unique_ptr<HeadGradients> (*head_gradients)(const Linear& classifier, int channels, int classes);
};

// An instruction set: each file of isa/ registers one. `rank` orders them; an ISA without factories for an element type
// uses those of the next lower rank that has them. They are constants: no code of an ISA runs before `runnable` has
// said that this CPU can.
struct Isa {
  const char* name;
  int rank;
  bool (*runnable)();            // does this CPU (and its kernel) run it?
  const Factories* of[kDTypes];  // in the order of DType; null for none
};

struct RegisterIsa {
  explicit RegisterIsa(const Isa& isa);
};

// Instruction sets built into this library, best first; of these, the ones this CPU runs.
std::vector<std::string> built_isas();
std::vector<std::string> runnable_isas();

// The factories of a runnable ISA; std::invalid_argument for any other name.
const Factories& factories(const std::string& isa, DType dtype);

}  // namespace pvt
