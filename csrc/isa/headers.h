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

#include "simd/gelu.h"
#include "kernels.h"
#include "runtime/memory.h"
#include "runtime/parallel.h"
#include "runtime/split.h"
