// Fixed calls of single ops for a count of their instructions: AVX2, float32, one thread. `make instructions` runs them
// under callgrind; see instructions.py.
//
//   instructions         prints the compiler, then the name of each call
//   instructions NAME    packs the op's weights, then makes the one call, inside counted()
#include <omp.h>

#include <cstdint>
#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"

// Callgrind finds it by its name and collects while it runs.
extern "C" __attribute__((noinline)) void counted(const std::function<void()>& call) {
  call();
  asm volatile("");  // no tail call, which would leave `counted` before the op runs
}

namespace {

// Asked for by name: valgrind shows no AVX-512, and the best ISA would differ from machine to machine.
const pvt::Factories& factories() { return pvt::factories("avx2", pvt::DType::f32); }

// Values in [-1, 1) from a linear congruence: no value is denormal, and drawing them costs few emulated instructions.
class Draw {
 public:
  const float* operator()(std::size_t size) {
    auto& values = drawn_.emplace_back(size);
    for (float& value : values) {
      state_ = state_ * 1664525 + 1013904223;
      value = float(std::int32_t(state_)) * 0x1p-31f;
    }
    return values.data();
  }
  pvt::Linear linear(std::size_t out, std::size_t in) { return {(*this)(out * in), (*this)(out)}; }
  pvt::Norm norm(int channels) { return {(*this)(channels), (*this)(channels), 1e-6f}; }

 private:
  std::uint32_t state_ = 1;
  std::vector<std::vector<float>> drawn_;  // a vector that moves keeps its values in place
};

void patch_embed(int side, int in_channels, int channels, int kernel, int stride) {
  Draw draw;
  const pvt::PatchEmbedWeights weights{
      draw.linear(channels, in_channels * kernel * kernel), draw.norm(channels), in_channels, channels, kernel, stride};
  const std::int64_t pixels = std::int64_t{side} * side;
  const pvt::Image image{draw(in_channels * pixels), 1, side, side, in_channels * pixels, pixels, side, 1};
  const auto op = factories().patch_embed(weights, false);
  const int rows = (side - 1) / stride + 1;
  std::vector<float> out(std::size_t(rows) * rows * channels);
  counted([&] { op->run(image, out.data()); });
}

void residual(const pvt::ResidualOp& op, int side, int channels, Draw& draw) {
  const std::size_t size = std::size_t(side) * side * channels;
  const float* x = draw(size);
  std::vector<float> out(size);
  counted([&] { op.run(x, {1, side, side}, nullptr, out.data()); });
}

void attention(int side, int channels, int heads, int sr_ratio, bool linear) {
  Draw draw;
  pvt::AttentionWeights weights{};
  weights.norm = draw.norm(channels);
  weights.q = draw.linear(channels, channels);
  weights.kv = draw.linear(2 * channels, channels);
  weights.sr = draw.linear(channels, channels * sr_ratio * sr_ratio);
  weights.sr_norm = draw.norm(channels);
  weights.proj = draw.linear(channels, channels);
  weights.channels = channels;
  weights.heads = heads;
  weights.sr_ratio = sr_ratio;
  weights.linear = linear;
  weights.scale = 0.125f;
  residual(*factories().attention(weights), side, channels, draw);
}

void mlp(int side, int channels, int hidden) {
  Draw draw;
  const pvt::MlpWeights weights{draw.norm(channels),
                                draw.linear(hidden, channels),
                                draw.linear(hidden, 9),
                                draw.linear(channels, hidden),
                                channels,
                                hidden,
                                false};
  residual(*factories().mlp(weights), side, channels, draw);
}

// Shapes of b2 and b2_li; those of the first stage are for an image of 112 px, the others of 224 px.
const std::map<std::string, std::function<void()>> kCalls = {
    {"patch_embed stage 1", [] { patch_embed(112, 3, 64, 7, 4); }},
    {"attention stage 2", [] { attention(28, 128, 2, 4, false); }},
    {"linear attention stage 2", [] { attention(28, 128, 2, 1, true); }},
    {"mlp stage 1", [] { mlp(28, 64, 512); }},
    {"mlp stage 4", [] { mlp(7, 512, 2048); }},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc == 1) {
    std::printf("%s\n", __VERSION__);
    for (const auto& call : kCalls) std::printf("%s\n", call.first.c_str());
    return 0;
  }
  const auto call = kCalls.find(argv[1]);
  if (call == kCalls.end()) {
    std::fprintf(stderr, "instructions: NAME must be a call that `instructions` lists, got %s\n", argv[1]);
    return 2;
  }
  omp_set_num_threads(1);
  call->second();
}
