// Every parallel region of every op: do its work items write bytes of their own only, and give the same bits in
// whatever order and on however many threads? Linked with isolated_items.cpp in place of runtime/parallel.cpp.
//
//   test_isolation [isa ...]   all runnable ISAs unless some are named
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "cases.h"
#include "isolated_items.h"
#include "runtime/memory.h"

namespace {

using isolated::Order;
using isolated::Region;
using isolated::Schedule;

// What the caller's ops share, large enough to stay where it is.
class SharedScratch {
 public:
  SharedScratch() : data_(room()) {}
  Region poisoned(unsigned char poison, std::size_t bytes) const {
    std::memset(data_, poison, kBytes);
    return {data_, bytes};
  }
  // The bytes up to the last one that is no longer poison.
  std::size_t used(unsigned char poison) const {
    std::size_t size = kBytes;
    while (size > 0 && data_[size - 1] == poison) --size;
    return size;
  }
  bool stayed() const { return room() == data_; }

 private:
  static constexpr std::size_t kBytes = std::size_t{8} << 20;
  static unsigned char* room() { return std::get<0>(pvt::shared_scratch().take(pvt::array<unsigned char>(kBytes))); }
  unsigned char* data_;
};

class Test {
 public:
  Test(const std::string& isa, pvt::DType dtype) : isa_(isa), dtype_(dtype), cases_(isa, dtype, Flush::end) {}

  void run(const Call& call) {
    const Tensor first = cases_.out(call);
    isolated::follow({}, {});
    call.run(first.data());
    for (int threads : {1, 2, 3, 8})
      for (std::size_t l2 : {std::size_t{1} << 14, std::size_t{1} << 17, std::size_t{1} << 18, std::size_t{1} << 21})
        run(call, first, threads, l2);
    isolated::follow({}, {});  // until the next call: ops that are made meanwhile pack their weights by items too
  }

  std::size_t runs = 0, items = 0, failed = 0;

 private:
  // Two poisons: what one hides, as it is written where it stands, the other shows.
  void run(const Call& call, const Tensor& first, int threads, std::size_t l2) {
    const std::size_t used = scratch_used(call, threads, l2);
    unsigned char poison = 0xff;
    for (Order order : {Order::ascending, Order::descending, Order::alternating, Order::shuffled}) {
      if (threads == 1 && order >= Order::alternating) continue;
      poison = poison == 0xff ? 0x41 : 0xff;
      const Tensor out = cases_.out(call);
      std::memset(out.data(), poison, out.bytes());
      isolated::take_count();
      isolated::follow({order, threads, l2},
                       {scratch_.poisoned(poison, used), {static_cast<unsigned char*>(out.data()), out.bytes()}});
      call.run(out.data());
      std::vector<std::string> faults = isolated::take_faults();
      if (std::memcmp(out.data(), first.data(), out.bytes()) != 0) faults.push_back("other bits than alone in order");
      if (!scratch_.stayed()) faults.push_back("more shared scratch than was watched");
      ++runs;
      items += isolated::take_count();
      failed += !faults.empty();
      for (const std::string& fault : faults)
        std::printf("FAILED %s %s %s, %d threads, l2 %zu, order %d: %s\n", isa_.c_str(), name_of(dtype_),
                    call.name.c_str(), threads, l2, int(order), fault.c_str());
    }
  }

  std::size_t scratch_used(const Call& call, int threads, std::size_t l2) {
    std::size_t used = 0;
    for (unsigned char poison : {0xff, 0x41}) {
      const Tensor out = cases_.out(call);
      scratch_.poisoned(poison, 0);
      isolated::follow({Order::ascending, threads, l2}, {});
      call.run(out.data());
      used = std::max(used, scratch_.used(poison));
    }
    return used;
  }

  std::string isa_;
  pvt::DType dtype_;
  SharedScratch scratch_;

 public:
  Cases cases_;
};

// Weights small and large for a cache, maps of few rows and of many, tails of every kind.
std::vector<Call> calls(Cases& cases) {
  return {
      cases.mlp({2, 13, 9, 24, 70, false, true}),
      cases.mlp({1, 9, 16, 64, 256, true}),
      cases.mlp({3, 4, 3, 33, 97}),
      cases.attention({2, 9, 7, 36, 3, 2, false, true}),
      cases.attention({1, 12, 13, 64, 2, 3}),
      cases.attention({2, 10, 9, 40, 2, 1, true}),
      cases.attention({3, 5, 7, 96, 2}),
      cases.attention({2, 15, 11, 64, 2, 5}),        // a sum in parts
      cases.patch_embed({1, 37, 35, 16, 64, 7, 4}),  // a patch fills its row, where vectors have eight lanes
      cases.patch_embed({1, 31, 29, 32, 64, 7, 4}),  // where they have sixteen
      cases.patch_embed({2, 33, 37, 3, 40, 7, 4, false, 1}),
      cases.patch_embed({1, 17, 15, 24, 72, 3, 2, true}),
      cases.norm({2, 77, 50, 0}),
      cases.norm({1, 150, 64, 0}),
      cases.head({17, 10, 96, 130}),
      cases.head({3, 10, 50, 0}),
  };
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> isas(argv + 1, argv + argc);
  if (isas.empty()) isas = pvt::runnable_isas();
  std::size_t failed = 0;
  for (const std::string& isa : isas)
    for (pvt::DType dtype : {pvt::DType::f32, pvt::DType::bf16, pvt::DType::mixed}) {
      Test test(isa, dtype);
      for (const Call& call : calls(test.cases_)) test.run(call);
      std::printf("%-12s %-4s %4zu runs of %zu items, %zu failed\n", isa.c_str(), name_of(dtype), test.runs, test.items,
                  test.failed);
      failed += test.failed;
    }
  return failed == 0 ? 0 : 1;
}
