// `round_to_bf16` in integers.
// Compiled once per ISA: included by isa/<isa>.cpp after simd/vec-inl.h, where the ISA has no instruction for it.

PVT_INLINE VecHalf round_to_bf16(Vec v) {
  const VecBits bits = reinterpret_cast<VecBits>(v);
  const VecBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const VecBits quiet = (bits >> 16) | 0x40;
  return __builtin_convertvector(v == v ? rounded : quiet, VecHalf);
}
