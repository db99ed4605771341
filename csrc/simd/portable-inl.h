// `widen`, `min` and `max` as the compiler lowers them.
// Compiled once per ISA: included by isa/<isa>.cpp after simd/vec-inl.h, where the ISA has nothing better.

PVT_INLINE VecBits widen(VecHalf h) { return __builtin_convertvector(h, VecBits); }
PVT_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
PVT_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
