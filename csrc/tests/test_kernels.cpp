// Checks every op of every ISA that this CPU runs against plain loops in double, every operand flush against a page
// that may not be touched, at its end and at its beginning. No Python: this is what the sanitizers run, and what a
// cross-compiled build would run.
//
//   test_kernels [isa ...]   all runnable ISAs unless some are named
#include <cstdio>

#include "cases.h"

namespace {

// The largest error may be a few roundings of the largest value: sums of n terms in float err by far less than
// sqrt(n) of them, and bf16 rounds each of an op's inner results (up to six) once.
bool is_right(const std::string& isa, pvt::DType dtype, const Call& call, const Tensor& actual) {
  const Values expected = call.expected();
  const double unit = dtype == pvt::DType::f32 ? 1.2e-7 : 7.9e-3;
  double largest = 0, error = 0;
  for (double value : expected) largest = std::fmax(largest, std::fabs(value));
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double e = std::fabs(actual[i] - expected[i]);
    if (!(e <= error)) error = e;
  }
  const double bound = (dtype == pvt::DType::f32 ? 32 : 4) * unit * largest;
  if (actual.size() == expected.size() && error <= bound) return true;
  std::printf("FAILED %s %s %s: error %.3e, bound %.3e\n", isa.c_str(), name_of(dtype), call.name.c_str(), error,
              bound);
  return false;
}

// The gradients of random directions against differences of the op by plain loops. One direction at a time, of one
// argument: all of its elements move by as much, up or down.
bool is_right(const std::string& isa, pvt::DType dtype, Flush flush, const GradientCall& call) {
  std::vector<Tensor> grads;
  std::vector<float*> addresses;
  for (const std::size_t size : call.sizes) {
    grads.emplace_back(size, pvt::DType::f32, flush);
    addresses.push_back(size ? static_cast<float*>(grads.back().data()) : nullptr);
  }
  const Tensor grad_x(call.x_size, dtype, flush);
  call.run(grad_x.data(), addresses.data());
  std::mt19937 random(3);
  const double step = 1e-7, unit = dtype == pvt::DType::f32 ? 1.2e-7 : 7.9e-3;
  const auto value = [&](const Values& x, const std::vector<Values>& weights) {
    const Values out = call.forward(x, weights);
    double total = 0;
    for (std::size_t i = 0; i < out.size(); ++i) total += out[i] * call.grad_out[i];
    return total;
  };
  bool right = true;
  for (std::size_t which = 0; which <= grads.size(); ++which) {
    const Tensor& found = which == 0 ? grad_x : grads[which - 1];
    if (which > 0 && addresses[which - 1] == nullptr) continue;
    if (which > 0 && call.weights[which - 1].empty()) continue;  // there is no such bias
    for (int repeat = 0; repeat < 2; ++repeat) {
      Values direction(found.size());
      double along = 0, squares = 0;
      for (std::size_t i = 0; i < direction.size(); ++i) {
        direction[i] = random() & 1 ? 1 : -1;
        along += found[i] * direction[i];
        squares += found[i] * found[i];
      }
      double ends[2];
      for (int end = 0; end < 2; ++end) {
        Values x = call.x;
        std::vector<Values> weights = call.weights;
        Values& moved = which == 0 ? x : weights[which - 1];
        for (std::size_t i = 0; i < moved.size(); ++i) moved[i] += (end ? step : -step) * direction[i];
        ends[end] = value(x, weights);
      }
      const double expected = (ends[1] - ends[0]) / (2 * step), error = std::fabs(along - expected);
      // errors of elements add up like their roots of squares, and what one rounding of the op's inner values makes of
      // all is no larger than a few of their size, or where a ReLU's mask turns with it some more; the differences
      // themselves are good to 1e-6
      const double bound =
          (dtype == pvt::DType::f32 ? 64 : 16) * unit * std::sqrt(squares) + 3e-6 * (std::fabs(expected) + 1);
      if (error <= bound) continue;
      right = false;
      std::printf("FAILED %s %s gradient %zu of %s: error %.3e, bound %.3e\n", isa.c_str(), name_of(dtype), which,
                  call.name.c_str(), error, bound);
    }
  }
  return right;
}

// More images than attention works on at a time: their normalised tokens take more than 8 MiB on every ISA.
AttentionShape waves() { return {50, 80, 80, 4, 1, 20, false, true}; }

std::vector<Call> calls(Cases& cases) {
  std::vector<Call> all;
  for (const MlpShape& shape : {
           MlpShape{3, 5, 9, 24, 70, false, true},
           MlpShape{1, 30, 6, 64, 128, true},  // tall enough for bands
           MlpShape{2, 1, 1, 33, 40, false, false, false},
           MlpShape{1, 7, 7, 96, 384},
           MlpShape{2, 4, 3, 1, 1, true, true},
           MlpShape{1, 2, 5, 17, 15},
       })
    all.push_back(cases.mlp(shape));
  for (const AttentionShape& shape : {
           AttentionShape{2, 6, 7, 36, 3, 2, false, true},
           AttentionShape{1, 9, 8, 64, 2, 1, false, false, false},
           AttentionShape{2, 10, 3, 20, 1, 1, true},
           AttentionShape{1, 16, 16, 32, 1, 8},
           AttentionShape{1, 1, 1, 40, 5},
           AttentionShape{3, 5, 7, 7, 7, 3, false, true},
           AttentionShape{1, 3, 11, 66, 2, 1, true, true, false},
           AttentionShape{2, 15, 11, 64, 2, 5},  // a sum in parts
           AttentionShape{2, 4, 2, 160, 2, 2},   // images that begin between tiles of the matrix unit
       })
    all.push_back(cases.attention(shape));
  for (const EmbedShape& shape : {
           EmbedShape{2, 21, 17, 3, 40, 7, 4},
           EmbedShape{1, 9, 12, 3, 64, 7, 4, true},
           EmbedShape{2, 7, 6, 20, 48, 3, 2, true},
           EmbedShape{1, 1, 1, 5, 9, 3, 2},
           EmbedShape{2, 19, 23, 16, 33, 7, 4, false, 3},  // a patch fills its row
           EmbedShape{2, 12, 10, 3, 17, 7, 2, true, 3},
           EmbedShape{1, 15, 15, 1, 8, 7, 1, true},
           EmbedShape{2, 3, 9, 7, 31, 1, 1, true, 1},  // pieces of 7 that are one pixel
           EmbedShape{1, 10, 9, 2, 5, 5, 3, false, 2},
           EmbedShape{1, 4, 40, 1, 3, 8, 4, false, 1},
       })
    all.push_back(cases.patch_embed(shape));
  for (const RowsShape& shape : {
           RowsShape{3, 10, 50, 11},
           RowsShape{1, 49, 512, 100},
           RowsShape{5, 3, 1, 1},
           RowsShape{2, 17, 15, 0},
           RowsShape{2, 5, 32, 33},
           RowsShape{1, 7, 64, 64},
       }) {
    all.push_back(cases.norm(shape));
    all.push_back(cases.head(shape));
  }
  return all;
}

std::vector<GradientCall> gradient_calls(Cases& cases) {
  std::vector<GradientCall> all;
  for (const MlpShape& shape : {
           MlpShape{3, 5, 9, 24, 70, false, true},
           MlpShape{1, 30, 6, 16, 40, true},
           MlpShape{2, 1, 1, 33, 40, false, false, false},
           MlpShape{2, 4, 3, 1, 1, true, true},
           MlpShape{1, 2, 5, 17, 150},
       })
    all.push_back(cases.mlp_gradients(shape));
  for (const AttentionShape& shape : {
           AttentionShape{2, 6, 7, 36, 3, 2, false, true},
           AttentionShape{1, 9, 8, 64, 2, 1, false, false, false},
           AttentionShape{2, 10, 3, 20, 1, 1, true},
           AttentionShape{1, 1, 1, 40, 5},
           AttentionShape{3, 5, 7, 7, 7, 3, false, true},
       })
    all.push_back(cases.attention_gradients(shape));
  for (const EmbedShape& shape : {
           EmbedShape{2, 21, 17, 3, 10, 7, 4},
           EmbedShape{2, 7, 6, 20, 48, 3, 2, true},
           EmbedShape{1, 1, 1, 5, 9, 3, 2},
           EmbedShape{2, 12, 10, 3, 17, 7, 2, true, 3},
           EmbedShape{1, 10, 9, 2, 5, 5, 3, false, 2},
       })
    all.push_back(cases.patch_embed_gradients(shape));
  for (const RowsShape& shape :
       {RowsShape{3, 10, 50, 11}, RowsShape{1, 49, 128, 100}, RowsShape{5, 3, 6, 1}, RowsShape{2, 17, 15, 0}}) {
    all.push_back(cases.norm_gradients(shape));
    all.push_back(cases.head_gradients(shape));
  }
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> isas(argv + 1, argv + argc);
  if (isas.empty()) isas = pvt::runnable_isas();
  int all = 0, failed = 0;
  for (const std::string& isa : isas)
    for (pvt::DType dtype : {pvt::DType::f32, pvt::DType::bf16, pvt::DType::mixed}) {
      int passed = 0;
      for (Flush flush : {Flush::end, Flush::begin}) {
        Cases cases(isa, dtype, flush);
        std::vector<Call> all_calls = calls(cases);
        if (flush == Flush::end && dtype == pvt::DType::f32) all_calls.push_back(cases.attention(waves()));
        for (const Call& call : all_calls) {
          const Tensor out = cases.out(call);
          call.run(out.data());
          ++all;
          is_right(isa, dtype, call, out) ? ++passed : ++failed;
        }
        for (const GradientCall& call : gradient_calls(cases)) {
          ++all;
          is_right(isa, dtype, flush, call) ? ++passed : ++failed;
        }
      }
      std::printf("%-12s %-4s %3d passed\n", isa.c_str(), name_of(dtype), passed);
    }
  std::printf("%d passed, %d failed\n", all - failed, failed);
  return failed == 0 ? 0 : 1;
}
