// The register tile of bf16: pairs of products are added to float sums by one instruction.
// Compiled once per ISA: included by isa/<isa>.cpp after gemm/tile-inl.h. The file has defined `VecPairs`, kLanes
// pairs, and its `load_pairs`, `splat_pair` and `dot`.

template <>
inline constexpr int kDepthStep<bf16> = 2;

template <int kRows, int kVectors>
PVT_INLINE void multiply_tile(const bf16* a, std::ptrdiff_t lda, const bf16* b, int depth, Ahead& ahead,
                              Vec (&acc)[kRows][kVectors]) {
#pragma GCC unroll 2
  for (int k = 0; k < depth; k += 2, b += 2 * kVectors * kLanes) {
    VecPairs panel[kVectors];
    unrolled<kVectors>([&](auto i) PVT_LAMBDA { panel[i] = load_pairs(b + 2 * i * kLanes); });
    ahead.fetch();
    unrolled<kRows>([&](auto r) PVT_LAMBDA {
      const VecPairs pair = splat_pair(a + r * lda + k);
      unrolled<kVectors>([&](auto i) PVT_LAMBDA { acc[r][i] = dot(acc[r][i], pair, panel[i]); });
    });
  }
}
