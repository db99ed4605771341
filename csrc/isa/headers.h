// What every ISA's file includes before it opens its target region: nothing of the standard library may be compiled
// for an ISA that not every CPU has.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "simd/gelu.h"
#include "kernels.h"
#include "runtime/memory.h"
#include "runtime/parallel.h"
#include "runtime/split.h"

#if defined(__x86_64__)
namespace pvt {
// All that the target regions of isa/avx2.cpp and isa/avx512*.cpp let the compiler use, of which an emulator or a
// hypervisor may hide any.
inline bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}
inline bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
inline bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
}  // namespace pvt
#endif
