// GELU and 2^x of vectors.
// Compiled once per ISA: included by isa/kernels-inl.h, which says how.

// 1.5 * 2^23: added to a float of moderate size it rounds to the nearest integer, which stands in the sum's low bits.
constexpr float kRoundToInteger = 12582912.0f;

template <std::size_t N>
PVT_INLINE Vec polynomial(const float (&coefficients)[N], Vec x) {
  Vec y = splat(coefficients[N - 1]);
#pragma GCC unroll 16
  for (int i = int(N) - 2; i >= 0; --i) y = y * x + coefficients[i];
  return y;
}

// GELU(x) = x / 2 + h(|x|), by the polynomial of the nearest node in a table that registers hold: a third of the
// multiply-adds that one polynomial for all x takes. kPrecise: for float; else for bfloat16.
template <bool kPrecise>
PVT_INLINE Vec gelu_by_table(Vec x) {
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

// Phi(x) - 1/2 as an odd polynomial of z = x / clip on [-1, 1], in t = 2 z^2 - 1 (a minimax fit, weighted for the error
// of GELU(x) = x Phi(x)). kPrecise: that is 8e-7 at most on [-9, 9], as torch's erf in float (1.2e-6); else 3e-5, a
// hundredth of bfloat16's rounding at 1. At z = +-1 the rounded sums are +-1/2 exactly: beyond, however far, GELU is 0
// or x; of minus infinity it is NaN, as torch's.
template <bool kPrecise>
PVT_INLINE Vec normal_distribution(Vec x) {
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
  return z * p + 0.5f;
}

// kPrecise: for float; else for bfloat16.
template <bool kPrecise>
PVT_INLINE Vec gelu(Vec x) {
  if constexpr (kLanes == GeluTable < kPrecise ? 4 : 2 > ::kNodes)
    return gelu_by_table<kPrecise>(x);
  else
    return x * normal_distribution<kPrecise>(x);
}

// By the standard library, one lane after another.
inline Vec exact_gelu(Vec x) {
  float lanes[kLanes];
  store(lanes, x);
  for (float& lane : lanes) lane = float(0.5 * lane * std::erfc(lane * -0.70710678118654752440));
  return load(lanes);
}

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

// GELU and its derivative, Phi(x) + x phi(x).
template <bool kPrecise>
PVT_INLINE Vec gelu_and_slope(Vec x, Vec& slope) {
  constexpr float kHalfLog2e = 0.72134752044448170f, kDensityAtZero = 0.39894228040143268f;
  const Vec phi = exp2_nonpositive<kPrecise>(x * x * -kHalfLog2e) * kDensityAtZero,
            share = normal_distribution<kPrecise>(x);
  slope = share + x * phi;
  return x * share;
}
