// How threads share out work: every item once and seen by the caller, whoever comes late, sleeps or throws; and whole
// forwards on several threads, which callers on threads of their own run at once, give the bits of one thread. This is
// what ThreadSanitizer runs beside test_kernels.
#include <omp.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "runtime/forward.h"
#include "kernels.h"
#include "runtime/parallel.h"

namespace {

int failed = 0;

void check(bool holds, const char* what) {
  if (holds) return;
  ++failed;
  std::printf("FAILED %s\n", what);
}

void items_of_jobs() {
  pvt::with_team([&] {
    for (int job = 0; job < 300; ++job) {
      std::vector<int> done(job % 23);  // by no more than one thread each: a race else
      pvt::parallel_for(std::int64_t(done.size()), [&](std::int64_t item) {
        if (job % 50 == 7) std::this_thread::sleep_for(std::chrono::microseconds(300));  // the others fall asleep
        ++done[item];
      });
      for (const int count : done) check(count == 1, "every item once");
    }
  });
}

void one_job_without_a_team() {
  std::vector<int> done(100);
  pvt::parallel_for(100, [&](std::int64_t item) { ++done[item]; });
  for (const int count : done) check(count == 1, "every item once, without a team");
}

void exceptions() {
  for (int thrower = 0; thrower < 8; ++thrower) {
    bool caught = false;
    try {
      pvt::with_team([&] {
        pvt::parallel_for(8, [&](std::int64_t item) {
          std::this_thread::sleep_for(std::chrono::microseconds(20));
          if (item == thrower) throw std::runtime_error("item");
        });
        check(false, "the job whose item throws, throws");
      });
    } catch (const std::runtime_error&) {
      caught = true;
    }
    check(caught, "what an item throws reaches the caller");
  }
  pvt::with_team([] {
    for (int job = 0; job < 3; ++job) {
      try {
        pvt::parallel_for(8, [](std::int64_t) { throw std::runtime_error("item"); });
        check(false, "every job throws");
      } catch (const std::runtime_error&) {
      }
    }
    std::atomic<int> count{0};
    pvt::parallel_for(8, [&](std::int64_t) { ++count; });
    check(count == 8, "jobs after one that threw");
  });
}

// A model of two stages with drawn weights.
class Model {
 public:
  Model(const std::string& isa, pvt::DType dtype) : element_(pvt::element_size(dtype)) {
    const pvt::Factories& make = pvt::factories(isa, dtype);
    int in = 3;
    for (const int channels : {32, 64}) {
      const int kernel = in == 3 ? 7 : 3, stride = in == 3 ? 4 : 2, sr = in == 3 ? 2 : 1, hidden = 4 * channels;
      embeds_.push_back(make.patch_embed(
          {linear(channels, in * kernel * kernel), norm(channels), in, channels, kernel, stride}, in != 3));
      pvt::AttentionWeights w{};
      w.norm = norm(channels);
      w.q = linear(channels, channels), w.kv = linear(2 * channels, channels), w.proj = linear(channels, channels);
      if (sr > 1) w.sr = linear(channels, channels * sr * sr), w.sr_norm = norm(channels);
      w.channels = channels, w.heads = 2, w.sr_ratio = sr, w.scale = 0.2f;
      residuals_.push_back(make.attention(w));
      residuals_.push_back(make.mlp({norm(channels), linear(hidden, channels), linear(hidden, 9),
                                     linear(channels, hidden), channels, hidden, false}));
      norms_.push_back(make.layer_norm(norm(channels), channels));
      in = channels;
    }
    head_ = make.head(linear(10, in), in, 10);
    std::vector<pvt::Op> ops;
    for (std::size_t stage = 0; stage < 2; ++stage) {
      ops.push_back(embeds_[stage].get());
      ops.push_back(residuals_[2 * stage].get());
      ops.push_back(residuals_[2 * stage + 1].get());
      ops.push_back(norms_[stage].get());
    }
    ops.push_back(head_.get());
    forward_ = std::make_unique<pvt::Forward>(ops, element_);
    image_ = draw(2 * 3 * kSide * kSide, element_);
  }

  std::vector<char> run(int threads) const {
    omp_set_num_threads(threads);
    std::vector<char> logits(2 * 10 * element_);
    forward_->run({image_, 2, kSide, kSide, 3 * kSide * kSide, kSide * kSide, kSide, 1}, logits.data());
    return logits;
  }

 private:
  static constexpr int kSide = 70;

  // Values of `element` bytes: floats, or the upper halves of some.
  const void* draw(std::size_t count, std::size_t element) {
    std::normal_distribution<float> normal(0, 0.1f);
    auto values = std::make_unique<char[]>(count * element);
    for (std::size_t i = 0; i < count; ++i) {
      const float value = normal(random_);
      std::uint32_t bits;
      std::memcpy(&bits, &value, 4);
      if (element == 2) bits >>= 16;
      std::memcpy(&values[i * element], &bits, element);
    }
    drawn_.push_back(std::move(values));
    return drawn_.back().get();
  }
  const float* floats(std::size_t count) { return static_cast<const float*>(draw(count, 4)); }
  pvt::Norm norm(int channels) { return {floats(channels), floats(channels), 1e-6f}; }
  pvt::Linear linear(int out, int in) { return {draw(std::size_t(out) * in, element_), floats(out)}; }

  std::size_t element_;
  std::mt19937 random_{7};
  std::vector<std::unique_ptr<char[]>> drawn_;
  std::vector<std::unique_ptr<pvt::PatchEmbed>> embeds_;
  std::vector<std::unique_ptr<pvt::ResidualOp>> residuals_;
  std::vector<std::unique_ptr<pvt::LayerNorm>> norms_;
  std::unique_ptr<pvt::Head> head_;
  std::unique_ptr<pvt::Forward> forward_;
  const void* image_;
};

void forwards(const std::string& isa, pvt::DType dtype) {
  const Model model(isa, dtype);
  const std::vector<char> alone = model.run(1);
  std::vector<std::thread> callers;
  std::atomic<int> wrong{0};
  for (int caller = 0; caller < 2; ++caller)
    callers.emplace_back([&, caller] {
      for (int call = 0; call < 3; ++call) wrong += model.run(2 + caller) != alone;
    });
  for (std::thread& caller : callers) caller.join();
  check(wrong == 0, "forwards of several callers, each on several threads, as of one");
}

}  // namespace

int main() {
  alarm(600);  // a thread that waits for ever fails, too
  omp_set_num_threads(4);
  items_of_jobs();
  one_job_without_a_team();
  exceptions();
  for (const std::string& isa : pvt::runnable_isas())
    for (const pvt::DType dtype : {pvt::DType::f32, pvt::DType::bf16, pvt::DType::mixed}) forwards(isa, dtype);
  std::printf("%s\n", failed == 0 ? "passed" : "failed");
  return failed == 0 ? 0 : 1;
}
