// `widen`, `min` and `max` of the ISAs with vectors of 512 bits.
// Compiled once per ISA: included by isa/<isa>.cpp after simd/vec-inl.h.

PVT_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
PVT_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
PVT_INLINE VecBits widen(VecHalf h) {  // GCC 12 does it in halves
  return reinterpret_cast<VecBits>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(h)));
}
