#include "runtime/parallel.h"

#include <omp.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "runtime/memory.h"

namespace pvt {

std::size_t l2_bytes() {
  static const std::size_t bytes = [] {
#ifdef _SC_LEVEL2_CACHE_SIZE
    const long size = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (size > 0) return static_cast<std::size_t>(size);
#endif
    return std::size_t{1} << 20;
  }();
  return bytes;
}

namespace {

// [begin, end) in one word, so that owner and thieves agree on every item; on a cache line of its own.
class alignas(64) Range {
 public:
  void set(std::uint32_t begin, std::uint32_t end) { word_.store(join(begin, end), std::memory_order_relaxed); }
  std::uint32_t left() const { return size(word_.load(std::memory_order_relaxed)); }
  std::int64_t take_first() {
    return take([](std::uint64_t word) { return word + 1; }, [](std::uint64_t word) { return word & kBegin; });
  }
  std::int64_t take_last() {
    return take([](std::uint64_t word) { return word - (kBegin + 1); },
                [](std::uint64_t word) { return (word >> 32) - 1; });
  }

 private:
  static constexpr std::uint64_t kBegin = 0xffffffff;  // the half that holds `begin`
  static std::uint64_t join(std::uint64_t begin, std::uint64_t end) { return end << 32 | begin; }
  static std::uint32_t size(std::uint64_t word) { return std::uint32_t(word >> 32) - std::uint32_t(word & kBegin); }

  template <class Without, class Item>
  std::int64_t take(const Without& without, const Item& item) {
    std::uint64_t word = word_.load(std::memory_order_relaxed);
    while (size(word) > 0)
      if (word_.compare_exchange_weak(word, without(word), std::memory_order_relaxed)) return std::int64_t(item(word));
    return -1;
  }

  std::atomic<std::uint64_t> word_{0};
};

// A thread at the items of a job.
class Thief : public Worker {
 public:
  Thief(std::vector<Range>& ranges, std::size_t own) : ranges_(ranges), own_(own) {}

  std::int64_t next() override {
    std::int64_t item = ranges_[own_].take_first();
    while (item < 0) {
      Range* fullest = &ranges_[own_];
      for (Range& range : ranges_)
        if (range.left() > fullest->left()) fullest = &range;
      if (fullest->left() == 0) return -1;
      item = fullest->take_last();
    }
    return item;
  }

 private:
  std::vector<Range>& ranges_;
  std::size_t own_;
};

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The core that runs the calling thread, where the system tells.
int current_core() {
#ifdef __linux__
  return sched_getcpu();
#else
  return -1;
#endif
}

// Longer than a job of a small model takes, and what the caller does alone between jobs; shorter than a core that other
// processes use comes back.
constexpr auto kSpin = std::chrono::microseconds(50);

// Waits until `done()`: looks again and again for a while, then sleeps until `wake`.
class Waiting {
 public:
  template <class Done>
  void wait(const Done& done) {
    if (done()) return;
    const auto until = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < 16; ++i) {
        if (done()) return;
        pause_briefly();
      }
    } while (std::chrono::steady_clock::now() < until);
    std::unique_lock<std::mutex> lock(mutex_);
    asleep_.fetch_add(1);  // before `done` is asked once more: who made it so sees a sleeper, or the sleeper sees that
    condition_.wait(lock, done);
    asleep_.fetch_sub(1);
  }
  bool anyone() const { return asleep_.load() > 0; }
  void wake() {
    if (!anyone()) return;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
    }
    condition_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable condition_;
  std::atomic<int> asleep_{0};
};

// Threads of one parallel region: the caller publishes jobs, one after another, and the others join the one that is
// open. One word says which job that is and how many have joined, so that nobody joins a job whose end has been seen.
class Team {
 public:
  explicit Team(int threads) : ranges_(threads) {}

  int threads() const { return int(ranges_.size()); }

  // Of the caller, for two items or more: every one is done when this returns.
  void run(std::int64_t items, void (*body)(void*, Worker&), void* context) {
    share_out(items);
    body_ = body, context_ = context;
    caller_core_.store(current_core(), std::memory_order_relaxed);
    job_ += kJob;
    state_.store(job_ | kOpen);
    if (items <= threads()) others_.wake();
    Caller worker(*this);
    work(worker);
    state_.fetch_and(~kOpen);
    caller_.wait([&] { return (state_.load() & kJoined) == 0; });
    failed_.clear();
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  // Of every other thread, until the caller dismisses it.
  void serve(std::size_t own) {
    std::uint64_t last = 0, state;
    for (;;) {
      others_.wait([&] { return job_of(state = state_.load()) != last; });
      last = job_of(state);
      if (last == kDismissed) break;
      if (!join(state)) continue;
      const int core = current_core();
      const bool same = core >= 0 && core == caller_core_.load(std::memory_order_relaxed);
      (same ? joined_there_ : joined_elsewhere_).store(true, std::memory_order_relaxed);
      Thief worker(ranges_, own);
      work(worker);
      if ((state_.fetch_sub(1) & (kJoined | kOpen)) == 1) caller_.wake();
    }
    dismissed_.fetch_add(1);
    caller_.wake();
  }

  // Did others help, and all from the core that the caller runs on? They took from it what they gave.
  bool was_crowded() const { return joined_there_ && !joined_elsewhere_; }

  // Returns when the others are about to leave: the end of a parallel region spins, for milliseconds if it must, and
  // would keep a thread from running that waits for this core.
  void dismiss(int others) {
    state_.store(kDismissed);
    others_.wake();
    caller_.wait([&] { return dismissed_.load() == others; });
  }

 private:
  static constexpr std::uint64_t kJoined = 0xffff, kOpen = 0x10000, kJob = 0x20000, kDismissed = ~(kJob - 1);
  static std::uint64_t job_of(std::uint64_t state) { return state & kDismissed; }

  // Wakes who sleeps once it has seen that items are left: what is done within one item is not worth it.
  class Caller final : public Thief {
   public:
    explicit Caller(Team& team) : Thief(team.ranges_, 0), team_(team) {}
    std::int64_t next() override {
      const std::int64_t item = Thief::next();
      if (begun_ && team_.others_.anyone() && team_.is_left()) team_.others_.wake();
      begun_ = true;
      return item;
    }

   private:
    Team& team_;
    bool begun_ = false;
  };

  void share_out(std::int64_t items) {
    const std::int64_t shares = std::min<std::int64_t>(items, threads());
    for (std::int64_t t = 0; t < threads(); ++t)
      ranges_[t].set(t < shares ? std::uint32_t(items * t / shares) : 0,
                     t < shares ? std::uint32_t(items * (t + 1) / shares) : 0);
  }
  bool is_left() const {
    return std::any_of(ranges_.begin(), ranges_.end(), [](const Range& range) { return range.left() > 0; });
  }
  bool join(std::uint64_t state) {
    const std::uint64_t job = job_of(state);
    while (job_of(state) == job && (state & kOpen))
      if (state_.compare_exchange_weak(state, state + 1)) return true;
    return false;
  }
  // An exception (out of memory) may not leave a parallel region: the first one is carried to the caller by hand.
  void work(Worker& worker) {
    try {
      body_(context_, worker);
    } catch (...) {
      if (!failed_.test_and_set()) error_ = std::current_exception();
    }
  }

  std::vector<Range> ranges_;
  void (*body_)(void*, Worker&) = nullptr;
  void* context_ = nullptr;
  std::uint64_t job_ = 0;
  alignas(64) std::atomic<std::uint64_t> state_{0};
  Waiting others_, caller_;
  std::atomic<int> caller_core_{-1}, dismissed_{0};
  std::atomic<bool> joined_there_{false}, joined_elsewhere_{false};
  std::atomic_flag failed_ = ATOMIC_FLAG_INIT;
  std::exception_ptr error_;
};

thread_local Team* current_team = nullptr;  // of the thread that calls

// While other processes take the other cores, the system may leave all threads of a team on one. Alone the caller has
// it for itself: no switches, and nobody who spins at the end of a parallel region, for longer than a small model
// takes. It tries again after a while, which doubles as long as nothing has changed.
class Crowding {
 public:
  bool lasts() const { return Clock::now() < until_; }
  void tell(bool crowded) {
    pause_ = crowded ? std::min(2 * pause_, kLongest) : kShortest;
    if (crowded) until_ = Clock::now() + pause_;
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr Clock::duration kShortest = std::chrono::milliseconds(25), kLongest = std::chrono::milliseconds(400);
  Clock::duration pause_ = kShortest;
  Clock::time_point until_;
};

thread_local Crowding crowding;
thread_local bool is_alone = false;

struct Alone {
  Alone() { is_alone = true; }
  ~Alone() { is_alone = false; }
};

// body(thread, count of the others) on up to `threads` threads, the calling one with 0.
template <class Body>
void on_threads(int threads, const Body& body) {
#ifdef __SANITIZE_THREAD__  // which does not see how OpenMP's threads wait for one another
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(body, t, threads - 1);
  body(0, threads - 1);
  for (std::thread& other : others) other.join();
#else
#pragma omp parallel num_threads(threads)
  body(omp_get_thread_num(), omp_get_num_threads() - 1);
#endif
}

// body() on the calling thread, as the caller of a team of so many threads.
// Was that team crowded?
template <class Body>
bool open_team(int threads, const Body& body) {
  Team team(threads);
  std::exception_ptr error;
  on_threads(threads, [&](int thread, int others) {
    if (thread != 0) {
      team.serve(thread);
      trim_scratch();
      return;
    }
    current_team = &team;
    try {
      body();
    } catch (...) {
      error = std::current_exception();
    }
    current_team = nullptr;
    team.dismiss(others);
  });
  if (error) std::rethrow_exception(error);
  return team.was_crowded();
}

}  // namespace

int max_threads() {
  if (current_team) return current_team->threads();
  return is_alone || omp_in_parallel() ? 1 : omp_get_max_threads();
}

void with_team(void (*body)(void*), void* context) {
  if (current_team || max_threads() == 1) {
    body(context);
    return;
  }
  if (crowding.lasts()) {
    const Alone alone;
    body(context);
  } else {
    crowding.tell(open_team(max_threads(), [&] { body(context); }));
  }
}

void parallel_workers(std::int64_t items, void (*body)(void*, Worker&), void* context) {
  const std::int64_t threads = std::min<std::int64_t>(items, max_threads());
  if (threads <= 0) return;
  if (threads == 1) {
    std::vector<Range> all(1);
    all[0].set(0, std::uint32_t(items));
    Thief worker(all, 0);
    body(context, worker);
  } else if (current_team) {
    current_team->run(items, body, context);
  } else {
    open_team(int(threads), [&] { current_team->run(items, body, context); });
  }
}

}  // namespace pvt
