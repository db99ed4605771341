// The vector vocabulary: kLanes floats, in GCC's vector extensions. Included once inside each ISA's namespace, with
// PVT_LANES set and the ISA's target region open; what an ISA does better than the compiler is in its own file, under
// the PVT_HAS_* macros named here.

constexpr int kLanes = PVT_LANES;

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
#ifdef PVT_HAS_WIDEN
PVT_INLINE VecBits widen(VecHalf h);
#else
PVT_INLINE VecBits widen(VecHalf h) { return __builtin_convertvector(h, VecBits); }
#endif
PVT_INLINE Vec load(const bf16* p) {
  VecHalf h;
  std::memcpy(&h, p, sizeof h);
  return reinterpret_cast<Vec>(widen(h) << 16);
}

PVT_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

#ifdef PVT_HAS_ROUND_TO_BF16
PVT_INLINE VecHalf round_to_bf16(Vec v);
#else
// Round to nearest even, NaN stays NaN.
PVT_INLINE VecHalf round_to_bf16(Vec v) {
  const VecBits bits = reinterpret_cast<VecBits>(v);
  const VecBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const VecBits quiet = (bits >> 16) | 0x40;
  return __builtin_convertvector(v == v ? rounded : quiet, VecHalf);
}
#endif
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

// Where an argument is NaN, the second one.
#ifdef PVT_HAS_MIN_MAX
PVT_INLINE Vec min(Vec a, Vec b);
PVT_INLINE Vec max(Vec a, Vec b);
#else
PVT_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
PVT_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
#endif

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

// 1 in the first n lanes, 0 in the others.
PVT_INLINE Vec first_lanes(int n) {
  static constexpr float kLane[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load(kLane) < float(n) ? splat(1) : Vec{};
}

// 1.5 * 2^23: added to a float of moderate size it rounds to the nearest integer, which stands in the sum's low bits.
constexpr float kRoundToInteger = 12582912.0f;

template <std::size_t N>
PVT_INLINE Vec polynomial(const float (&coefficients)[N], Vec x) {
  Vec y = splat(coefficients[N - 1]);
#pragma GCC unroll 16
  for (int i = int(N) - 2; i >= 0; --i) y = y * x + coefficients[i];
  return y;
}

#if PVT_LANES == 16
// GELU(x) = x / 2 + h(|x|), by the polynomial of the nearest node in a table that registers hold: a third of the
// multiply-adds that one polynomial for all x takes. kPrecise: for float; else for bfloat16.
template <bool kPrecise>
PVT_INLINE Vec gelu(Vec x) {
  using Table = std::conditional_t<kPrecise, GeluTable<4>, GeluTable<2>>;
  const Table* table;
  if constexpr (kPrecise)
    table = &kGelu;
  else
    table = &kRoughGelu;
  const Vec size = reinterpret_cast<Vec>(reinterpret_cast<VecBits>(x) & 0x7fffffff);
  // past the last node, and for NaN, the last one's polynomial goes on
  const Vec shifted = min(size * (1 / Table::kStep) + kRoundToInteger, splat(kRoundToInteger + Table::kNodes - 1));
  const VecInt node = reinterpret_cast<VecInt>(shifted);  // in its low bits
  const Vec u = size - (shifted - kRoundToInteger) * Table::kStep;
  // the last node's higher coefficients are 0, which times infinity were NaN: of infinity GELU is infinity
  const Vec finite = min(splat(__FLT_MAX__), u);
  constexpr int kDegree = kPrecise ? 4 : 2;
  Vec h = __builtin_shuffle(load(table->coefficients[kDegree]), node);
#pragma GCC unroll 4
  for (int power = kDegree - 1; power > 0; --power)
    h = h * finite + __builtin_shuffle(load(table->coefficients[power]), node);
  h = h * u + __builtin_shuffle(load(table->coefficients[0]), node);
  return x * 0.5f + h;
}
#else
// GELU(x) = x Phi(x), with Phi(x) - 1/2 an odd polynomial of z = x / clip on [-1, 1], in t = 2 z^2 - 1 (a minimax fit,
// weighted for the error of x Phi). kPrecise: 8e-7 at most on [-9, 9], as torch's erf in float (1.2e-6); else 3e-5,
// a hundredth of bfloat16's rounding at 1. At z = +-1 the rounded sums are +-1/2 exactly: beyond, however far, GELU is
// 0 or x; of minus infinity it is NaN, as torch's.
template <bool kPrecise>
PVT_INLINE Vec gelu(Vec x) {
  constexpr float kClip = kPrecise ? 5.4f : 4.4f;
  const Vec z = max(min(x * (1 / kClip), splat(1)), splat(-1));
  const Vec t = z * z * 2.0f - 1.0f;
  Vec p;
  if constexpr (kPrecise) {
    constexpr float c[] = {0.7070118188858032f,   -0.352771133184433f,    0.2618967592716217f,   -0.21173009276390076f,
                           0.1734537035226822f,   -0.13890071213245392f,  0.10588783025741577f,  -0.07593696564435959f,
                           0.052842818200588226f, -0.03521079942584038f,  0.018420686945319176f, -0.007386262062937021f,
                           0.005915357731282711f, -0.005206327885389328f, 0.00171330024022609f};
    p = polynomial(c, t);
  } else {
    constexpr float c[] = {0.7057790160179138f,   -0.34589245915412903f, 0.24310339987277985f,
                           -0.17641742527484894f, 0.11793915182352066f,  -0.07021798193454742f,
                           0.04829125106334686f,  -0.0347604863345623f,  0.012175514362752438f};
    p = polynomial(c, t);
  }
  return x * (z * p + 0.5f);
}
#endif

// 2^x for x <= 0; exact 1 at 0, 0 from -127 on and not exact below -126; NaN stays NaN (hence the order inside max).
// kPrecise: relative error 2e-7; else 1e-4, a twentieth of bfloat16's rounding.
template <bool kPrecise>
PVT_INLINE Vec exp2_nonpositive(Vec x) {
  const Vec bounded = max(splat(-127.0f), x);
  const Vec shifted = bounded + kRoundToInteger;
  const Vec u = bounded - (shifted - kRoundToInteger);
  Vec fraction;
  if constexpr (kPrecise) {
    constexpr float c[] = {1.0f,
                           0.6931471824645996f,
                           0.24022646248340607f,
                           0.05550329014658928f,
                           0.009618519805371761f,
                           0.0013399859890341759f,
                           0.00015337577497120947f};
    fraction = polynomial(c, u);
  } else {
    constexpr float c[] = {1.0f, 0.69328293f, 0.24221096f, 0.05500893f};
    fraction = polynomial(c, u);
  }
  const VecInt exponent = reinterpret_cast<VecInt>(shifted) << 23;  // the low bits of `shifted` hold the integer
  return reinterpret_cast<Vec>(reinterpret_cast<VecInt>(fraction) + exponent);
}
