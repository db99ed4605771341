// What the machine can do at most on a number of threads at once, each figure measured for 50 ms:
//
//   peak ISA THREADS   prints {"fp32": GFLOP/s, "bf16": GFLOP/s, "read": GB/s}, totals over the threads
//
// fp32   multiply-adds of registers in the vectors that the ISA's kernels use, in independent chains
// bf16   the instruction that those kernels multiply bf16 with: AMX tiles, vdpbf16ps, or, where bf16 is widened to
//        float, the same as fp32
// read   sums over a buffer four times as large as the last-level cache
//
// ISA is one of those that `pvt-fast doctor` lists; that the CPU runs it is the caller's promise.
#include <omp.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#endif

namespace {

constexpr double kSeconds = 0.05, kWarmUpSeconds = 0.005;
// Two units of latency 4 need eight chains; without FMA a multiply waits for an add as well. All fit 16 registers.
constexpr int kChains = 12;
// vdpbf16ps has a longer latency: Zen 5 does 10 % more with 16 chains than with 12.
constexpr int kDotChains = 20;
constexpr int kSteps = 1000;

// Calls of `work` per second, each weighted by what it returns.
template <class Work>
double rate(Work& work, double seconds) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  double done = 0, elapsed = 0;
  while (elapsed < seconds) {
    done += work();
    elapsed = std::chrono::duration<double>(Clock::now() - start).count();
  }
  return done / elapsed;
}

// The same, summed over threads that run at once; make_work(thread) gives each its own.
template <class MakeWork>
double total_rate(int threads, const MakeWork& make_work) {
  double total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
  {
    auto work = make_work(omp_get_thread_num());
    rate(work, kWarmUpSeconds);
#pragma omp barrier
    total += rate(work, kSeconds);
  }
  return total;
}

// A function that returns the flops it did. The empty asm hides where chains start: equal ones would be merged.
#define FMA_LOOP(name, isa, lanes)                                                                               \
  __attribute__((target(isa))) double name() {                                                                   \
    typedef float Vec __attribute__((vector_size(lanes * 4)));                                                   \
    const Vec half = Vec{} + 0.5f;                                                                               \
    Vec chain[kChains] = {};                                                                                     \
    _Pragma("GCC unroll 12") for (Vec& c : chain) asm("" : "+v"(c));                                             \
    for (int step = 0; step < kSteps; ++step) _Pragma("GCC unroll 12") for (Vec& c : chain) c = c * half + half; \
    _Pragma("GCC unroll 12") for (Vec& c : chain) asm volatile("" : : "v"(c));                                   \
    return 2.0 * lanes * kChains * kSteps;                                                                       \
  }

#if defined(__x86_64__)
FMA_LOOP(fma_scalar, "sse2", 4)
FMA_LOOP(fma_avx2, "avx2,fma", 8)
FMA_LOOP(fma_avx512, "avx512f", 16)

__attribute__((target("avx512f,avx512bf16"))) double dot_avx512_bf16() {
  const __m512bh half = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f00));
  __m512 chain[kDotChains] = {};
#pragma GCC unroll 20
  for (__m512& c : chain) asm("" : "+v"(c));
  for (int step = 0; step < kSteps; ++step)
#pragma GCC unroll 20
    for (__m512& c : chain) c = _mm512_dpbf16_ps(c, half, half);
#pragma GCC unroll 20
  for (__m512& c : chain) asm volatile("" : : "v"(c));
  return 2.0 * 32 * kDotChains * kSteps;
}

struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kTileConfig;

// Four accumulators over two tiles each way, as in the kernels; 16 x 16 sums of 32 products each.
__attribute__((target("amx-tile,amx-bf16"))) double tile_amx() {
  alignas(64) std::uint16_t half[16 * 32];
  std::fill(std::begin(half), std::end(half), 0x3f00);
  _tile_loadconfig(&kTileConfig);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, half, 64);
  _tile_loadd(5, half, 64);
  _tile_loadd(6, half, 64);
  _tile_loadd(7, half, 64);
  for (int step = 0; step < kSteps; ++step) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 2.0 * 16 * 16 * 32 * 4 * kSteps;
}

// Linux gives the tiles' registers to a process that asks: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA).
void ask_for_tiles() {
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) {
    std::fprintf(stderr, "peak: this process may not use AMX tiles\n");
    std::exit(1);
  }
}
#else
FMA_LOOP(fma_scalar, "default", 4)
#endif

double read_rate(int threads) {
  constexpr std::size_t kBlock = 1 << 17;  // words between looks at the clock: 1 MiB
  std::size_t cache = 0;
#ifdef _SC_LEVEL3_CACHE_SIZE
  cache = std::size_t(std::max(sysconf(_SC_LEVEL3_CACHE_SIZE), 0L));
#endif
  const std::size_t bytes = std::max(4 * cache, std::size_t{256} << 20);
  const std::size_t words = std::max(bytes / sizeof(std::uint64_t) / threads, kBlock);
  return total_rate(threads, [&](int) {
    return [buffer = std::vector<std::uint64_t>(words, 1), at = std::size_t{0}]() mutable {
      at = at + 2 * kBlock <= buffer.size() ? at + kBlock : 0;
      std::uint64_t sum = 0;
      for (std::size_t i = at; i < at + kBlock; ++i) sum += buffer[i];
      asm volatile("" : : "r"(sum));
      return double(kBlock * sizeof(std::uint64_t));
    };
  });
}

struct Isa {
  const char* name;
  double (*fp32)();
  double (*bf16)();
};
constexpr Isa kIsas[] = {
    {"scalar", fma_scalar, fma_scalar},
#if defined(__x86_64__)
    {"avx2", fma_avx2, fma_avx2},
    {"avx512", fma_avx512, fma_avx512},
    {"avx512_bf16", fma_avx512, dot_avx512_bf16},
    {"amx", fma_avx512, tile_amx},
#endif
};

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc == 3 ? argv[1] : "";
  const int threads = argc == 3 ? std::atoi(argv[2]) : 0;
  const Isa* isa = std::find_if(std::begin(kIsas), std::end(kIsas), [&](const Isa& i) { return name == i.name; });
  if (isa == std::end(kIsas) || threads < 1) {
    std::fprintf(stderr, "usage: peak ISA THREADS, an ISA of pvt-fast doctor and at least one thread; got");
    for (int i = 1; i < argc; ++i) std::fprintf(stderr, " %s", argv[i]);
    std::fprintf(stderr, "\n");
    return 2;
  }
#if defined(__x86_64__)
  if (isa->bf16 == tile_amx) ask_for_tiles();
#endif
  const double fp32 = total_rate(threads, [&](int) { return isa->fp32; });
  const double bf16 = total_rate(threads, [&](int) { return isa->bf16; });
  std::printf("{\"fp32\": %.6g, \"bf16\": %.6g, \"read\": %.6g}\n", fp32 / 1e9, bf16 / 1e9, read_rate(threads) / 1e9);
}
