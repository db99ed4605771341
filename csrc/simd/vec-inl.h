// The vector vocabulary: kLanes floats, in GCC's vector extensions.
// Compiled once per ISA: included by isa/<isa>.cpp inside its namespace and target region, after its `Target`. The same
// file then defines `widen`, `round_to_bf16`, `min` and `max`, which are declared here, by its own instructions or by
// including simd/portable-inl.h and simd/round_to_bf16-inl.h.

constexpr int kLanes = Target::kLanes;

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef std::int32_t VecInt __attribute__((vector_size(kLanes * 4)));
typedef std::uint32_t VecBits __attribute__((vector_size(kLanes * 4)));
typedef std::uint16_t VecHalf __attribute__((vector_size(kLanes * 2)));

// bfloat16: the upper half of a float. A type of its own, so that overloads tell it from an integer.
struct bf16 {
  std::uint16_t bits;
};

#define PVT_INLINE inline __attribute__((always_inline))

// body(0), body(1), ... body(n - 1), each index a constant: arrays that are only indexed so live in registers, which a
// loop unrolled by the optimiser comes too late for.
template <class Body, int... kIndex>
PVT_INLINE void unrolled(std::integer_sequence<int, kIndex...>, const Body& body) {
  (body(std::integral_constant<int, kIndex>()), ...);
}
template <int n, class Body>
PVT_INLINE void unrolled(const Body& body) {
  unrolled(std::make_integer_sequence<int, n>(), body);
}
#define PVT_LAMBDA __attribute__((always_inline))

PVT_INLINE Vec splat(float value) { return value - Vec{}; }

PVT_INLINE float to_float(float value) { return value; }
PVT_INLINE float to_float(bf16 value) {
  const std::uint32_t bits = std::uint32_t{value.bits} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

PVT_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
PVT_INLINE VecBits widen(VecHalf h);
PVT_INLINE Vec load(const bf16* p) {
  VecHalf h;
  std::memcpy(&h, p, sizeof h);
  return reinterpret_cast<Vec>(widen(h) << 16);
}

PVT_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// Round to nearest even, NaN stays NaN.
PVT_INLINE VecHalf round_to_bf16(Vec v);
PVT_INLINE void store(bf16* p, Vec v) {
  const VecHalf h = round_to_bf16(v);
  std::memcpy(p, &h, sizeof h);
}

// The first n < kLanes elements; the other lanes are 0, or not written.
template <class T>
PVT_INLINE Vec load_first(const T* p, int n) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}
template <class T>
PVT_INLINE void store_first(T* p, Vec v, int n) {
  T lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, n * sizeof(T));
}

// A vector of columns, or its first `count`.
template <class T>
PVT_INLINE void store_columns(T* to, Vec value, int count) {
  count == kLanes ? store(to, value) : store_first(to, value, count);
}
template <class T>
PVT_INLINE Vec load_columns(const T* from, int count) {
  return count == kLanes ? load(from) : load_first(from, count);
}

// Where an argument is NaN, the second one.
PVT_INLINE Vec min(Vec a, Vec b);
PVT_INLINE Vec max(Vec a, Vec b);

template <int kDistance, int... kLane>
PVT_INLINE Vec exchange(Vec v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, v, (kLane ^ kDistance)...);
}

// Rows that are worked on together where each needs a sum or a maximum of its own lanes.
constexpr int kRowGroup = 4;

template <int kDistance, class Combine, int... kLane>
PVT_INLINE Vec interleave(Vec a, Vec b, const Combine& combine, std::integer_sequence<int, kLane...>) {
  // lanes whose bit kDistance is 0 combine pairs of a, the others pairs of b
  return combine(__builtin_shufflevector(a, b, ((kLane & kDistance) ? kLanes + (kLane ^ kDistance) : kLane)...),
                 __builtin_shufflevector(a, b, ((kLane & kDistance) ? kLanes + kLane : kLane ^ kDistance)...));
}
template <int kDistance, class Combine>
PVT_INLINE Vec reduce_quarters(Vec v, const Combine& combine) {
  if constexpr (kDistance >= kLanes)
    return v;
  else
    return reduce_quarters<2 * kDistance>(combine(v, exchange<kDistance>(v, std::make_integer_sequence<int, kLanes>())),
                                          combine);
}
// All lanes of each of four vectors combined, that of v[i] in lanes i, i + 4, ...: half the work of one at a time, and
// no less of it for fewer. In what order does not depend on i.
template <class Combine>
PVT_INLINE Vec reduce(const Vec (&v)[kRowGroup], const Combine& combine) {
  constexpr auto kAll = std::make_integer_sequence<int, kLanes>();
  const Vec low = interleave<1>(v[0], v[1], combine, kAll), high = interleave<1>(v[2], v[3], combine, kAll);
  return reduce_quarters<4>(interleave<2>(low, high, combine, kAll), combine);
}

PVT_INLINE float sum_of_lanes(Vec v) {
  float lanes[kLanes], total = 0;
  store(lanes, v);
  for (float lane : lanes) total += lane;
  return total;
}

// 1 in the first n lanes, 0 in the others.
PVT_INLINE Vec first_lanes(int n) {
  static constexpr float kLane[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load(kLane) < float(n) ? splat(1) : Vec{};
}
