#include <algorithm>
#include <stdexcept>

#include "kernels.h"

namespace pvt {
namespace {

// Filled by static constructors in isa/*.cpp; a function-local static, so that it exists whichever runs first.
std::vector<Isa>& registry() {
  static std::vector<Isa> isas;
  return isas;
}

std::vector<std::string> names(bool runnable_only) {
  std::vector<std::string> result;
  for (const Isa& isa : registry())
    if (!runnable_only || isa.runnable()) result.push_back(isa.name);
  return result;
}

}  // namespace

RegisterIsa::RegisterIsa(const Isa& isa) {
  auto& isas = registry();
  isas.insert(std::find_if(isas.begin(), isas.end(), [&](const Isa& other) { return other.rank < isa.rank; }), isa);
}

std::vector<std::string> built_isas() { return names(false); }
std::vector<std::string> runnable_isas() { return names(true); }

const Factories& factories(const std::string& name, DType dtype) {
  const auto& isas = registry();
  auto isa = std::find_if(isas.begin(), isas.end(), [&](const Isa& i) { return name == i.name && i.runnable(); });
  for (; isa != isas.end(); ++isa)  // best first: those that follow have lower ranks
    if (const Factories* found = isa->of[int(dtype)]) return *found;
  throw std::invalid_argument("isa must be one this CPU runs, got " + name);
}

}  // namespace pvt
