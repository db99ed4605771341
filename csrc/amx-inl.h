// The AMX matrix unit: 16 x 16 float tiles += (16 x 32) x (32 x 16) bf16. Replaces the register tile for bf16 rows.

// Eight tiles of 16 rows of 64 bytes, as the CPU reads it.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// A constant in memory: GCC 12's intrinsic tells the compiler of the first 8 bytes only, so that it may leave out the
// stores that fill the rest of a local.
inline constexpr TileConfig kTileConfig;

// Holds the unit configured for a work item; other libraries on the same thread use it between items.
struct MatrixUnit {
  MatrixUnit() { _tile_loadconfig(&kTileConfig); }
  ~MatrixUnit() { _tile_release(); }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;
};

// Tiles 0-3 accumulate 32 x 32, 4-5 hold 32 rows of a, 6-7 the panel's two halves: each loaded tile is used twice.
template <bool kTwo>
PVT_INLINE void multiply_amx(const bf16* a, std::ptrdiff_t lda, const bf16* b, int depth, float* result) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTwo) {
    _tile_zero(2);
    _tile_zero(3);
  }
  constexpr int kPairRow = kPanel * 2 * sizeof(bf16);  // bytes of one k pair in the panel
  for (int k = 0; k < depth; k += 32, b += 32 * kPanel) {
    _tile_loadd(6, b, kPairRow);
    _tile_loadd(7, b + kPanel, kPairRow);
    _tile_loadd(4, a + k, lda * sizeof(bf16));
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTwo) {
      _tile_loadd(5, a + 16 * lda + k, lda * sizeof(bf16));
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  constexpr int kRowBytes = kPanel * sizeof(float);
  _tile_stored(0, result, kRowBytes);
  _tile_stored(1, result + 16, kRowBytes);
  if constexpr (kTwo) {
    _tile_stored(2, result + 16 * kPanel, kRowBytes);
    _tile_stored(3, result + 16 * kPanel + 16, kRowBytes);
  }
}

template <class Out>
void gemm_panel(const bf16* a, std::ptrdiff_t lda, int rows, const bf16* b, int depth, int column,
                const Epilogue<Out>& epilogue) {
  alignas(64) float result[32 * kPanel];
  const Vec bias0 = load(epilogue.bias + column), bias1 = load(epilogue.bias + column + kLanes);
  for (int row = 0; row < rows; row += 32) {
    const int height = rows - row < 32 ? rows - row : 32;
    if (height > 16)
      multiply_amx<true>(a + row * lda, lda, b, depth, result);
    else
      multiply_amx<false>(a + row * lda, lda, b, depth, result);
    for (int r = 0; r < height; ++r)
      epilogue.finish(row + r, column, load(result + r * kPanel) + bias0, load(result + r * kPanel + kLanes) + bias1);
  }
}
