#include "isolated_items.h"

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <random>
#include <thread>
#include <utility>

#include "runtime/parallel.h"

namespace isolated {
namespace {

Schedule schedule;
std::vector<Region> watched;
std::vector<std::string> faults;
std::size_t count = 0;

// One watched region of memory during one parallel region.
class Watched {
 public:
  explicit Watched(const Region& region)
      : region_(region),
        before_(region.data, region.data + region.bytes),
        after_(before_),
        owner_(region.bytes, kNobody) {}

  // Takes out what was written since the last call.
  void take(std::int32_t item) {
    constexpr std::size_t kBlock = 256;
    for (std::size_t at = 0; at < region_.bytes; at += kBlock) {
      const std::size_t size = std::min(kBlock, region_.bytes - at);
      if (std::memcmp(region_.data + at, &before_[at], size) == 0) continue;
      for (std::size_t i = at; i < at + size; ++i) take_byte(i, item);
    }
  }

  void finish() const { std::memcpy(region_.data, after_.data(), region_.bytes); }

 private:
  static constexpr std::int32_t kNobody = -1;

  void take_byte(std::size_t i, std::int32_t item) {
    if (region_.data[i] == before_[i]) return;
    if (owner_[i] != kNobody && !faulty_) {
      faulty_ = true;
      faults.push_back("items " + std::to_string(owner_[i]) + " and " + std::to_string(item) + " both write byte " +
                       std::to_string(i) + " of " + std::to_string(region_.bytes));
    }
    owner_[i] = item;
    after_[i] = region_.data[i];
    region_.data[i] = before_[i];
  }

  Region region_;
  std::vector<unsigned char> before_, after_;
  std::vector<std::int32_t> owner_;
  bool faulty_ = false;
};

// Who runs which item when. A worker holds the lock all the time, but where it waits for its turn.
class Items {
 public:
  Items(std::int64_t items, int workers) : order_(items), worker_(items) {
    std::mt19937 random{7};
    for (std::int64_t i = 0; i < items; ++i) order_[i] = std::int32_t(i), worker_[i] = 0;
    if (schedule.order == Order::descending) std::reverse(order_.begin(), order_.end());
    if (schedule.order == Order::shuffled) std::shuffle(order_.begin(), order_.end(), random);
    for (std::int64_t i = 0; i < items; ++i) {
      if (schedule.order == Order::alternating) worker_[i] = int(i % workers);
      if (schedule.order == Order::shuffled) worker_[i] = int(random() % workers);
    }
    for (const Region& region : watched) memory_.emplace_back(region);
  }

  void run(int workers, void (*body)(void*, pvt::Worker&), void* context) {
    std::vector<std::thread> threads;
    for (int w = 0; w < workers; ++w)
      threads.emplace_back([=] {
        std::unique_lock<std::mutex> lock(mutex_);
        Turn turn(*this, w, lock);
        body(context, turn);
      });
    for (std::thread& thread : threads) thread.join();
    take(-2);  // nothing may have been written but by items
    for (const Watched& memory : memory_) memory.finish();
  }

 private:
  class Turn final : public pvt::Worker {
   public:
    Turn(Items& items, int worker, std::unique_lock<std::mutex>& lock) : items_(items), worker_(worker), lock_(lock) {}
    std::int64_t next() override {
      if (running_) items_.finish();
      items_.changed_.wait(lock_, [this] { return items_.all_done() || items_.worker_[items_.at_] == worker_; });
      running_ = !items_.all_done();
      return running_ ? items_.order_[items_.at_] : -1;
    }

   private:
    Items& items_;
    int worker_;
    std::unique_lock<std::mutex>& lock_;
    bool running_ = false;
  };

  bool all_done() const { return at_ == order_.size(); }
  void take(std::int32_t item) {
    for (Watched& memory : memory_) memory.take(item);
  }
  void finish() {
    take(order_[at_]);
    ++at_;
    ++count;
    changed_.notify_all();
  }

  std::vector<std::int32_t> order_;
  std::vector<int> worker_;
  std::vector<Watched> memory_;
  std::size_t at_ = 0;
  std::mutex mutex_;
  std::condition_variable changed_;
};

}  // namespace

void follow(const Schedule& next, const std::vector<Region>& regions) {
  schedule = next;
  watched = regions;
}
std::vector<std::string> take_faults() { return std::exchange(faults, {}); }
std::size_t take_count() { return std::exchange(count, 0); }

}  // namespace isolated

namespace pvt {

int max_threads() { return isolated::schedule.threads; }
std::size_t l2_bytes() { return isolated::schedule.l2_bytes; }

void parallel_workers(std::int64_t items, void (*body)(void*, Worker&), void* context) {
  const int workers = int(std::min<std::int64_t>(items, max_threads()));
  if (workers > 0) isolated::Items(items, workers).run(workers, body, context);
}

}  // namespace pvt
