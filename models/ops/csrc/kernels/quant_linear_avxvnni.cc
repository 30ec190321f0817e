#include "quant_linear.h"

#include <immintrin.h>

#include <cstring>

#include "activation_curve.h"
#include "quant_conv.h"

namespace calmclip {

extern "C" QuantLinear quant_linear_avxvnni;
extern "C" QuantConv quant_conv_avxvnni;
extern "C" QuantConvTiles quant_conv_tiles_avxvnni;
extern "C" Int8Peak int8_peak_avxvnni;

namespace {

#include "dot_avxvnni.inc"
#include "partial_256.inc"
#include "quant_linear_256.inc"

inline __m256i four(const uint8_t* x) {
  int32_t bytes;
  std::memcpy(&bytes, x, sizeof bytes);
  return _mm256_set1_epi32(bytes);
}

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// Of the 16 registers twelve hold sums: three rows of 32 columns, or six rows of 16. The latter read half as many bytes
// of the panel for a product.
constexpr size_t kWideRows = 3;

// The sums of `vectors` vectors of columns, followed by the epilogue `end`. `multiply`: dot or dot_words.
template <size_t rows, size_t vectors, auto multiply, class End>
__attribute__((always_inline)) inline void product_of(const Product& p, size_t column, End end) {
  __m256i sum[rows][vectors];
#pragma GCC unroll 8
  for (size_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (size_t v = 0; v < vectors; ++v) sum[r][v] = load(p.from + r * p.from_stride + column + 8 * v);
  // One pointer for every third row, hidden from the compiler: see quant_linear_vnni.cc.
  constexpr size_t groups = (rows + 2) / 3;
  const size_t stride = p.stride;
  const int8_t *w = p.panel + 4 * column, *ahead = p.ahead + 4 * column;
  const uint8_t* line = p.x;
  for (size_t i = 1;; ++i) {
    const uint8_t* x[groups];
#pragma GCC unroll 8
    for (size_t g = 0; g < groups; ++g) x[g] = line + 3 * g * stride;
    for (const int8_t* last = w + p.steps * 4 * kPanel; w != last; w += 4 * kPanel) {
      for (size_t v = 0; v < vectors; v += 2) _mm_prefetch(ahead + 32 * v, _MM_HINT_T1);
      ahead += p.ahead_step;
      if constexpr (rows < vectors) {
        __m256i bytes[rows];
#pragma GCC unroll 8
        for (size_t r = 0; r < rows; ++r) bytes[r] = four(x[0] + r * stride);
#pragma GCC unroll 4
        for (size_t v = 0; v < vectors; ++v) {
          const __m256i columns = load(w + 32 * v);
#pragma GCC unroll 8
          for (size_t r = 0; r < rows; ++r) multiply(sum[r][v], bytes[r], columns);
        }
      } else {
        __m256i columns[vectors];
#pragma GCC unroll 4
        for (size_t v = 0; v < vectors; ++v) columns[v] = load(w + 32 * v);
#pragma GCC unroll 8
        for (size_t r = 0; r < rows; ++r) {
          const __m256i bytes = four(x[r / 3] + r % 3 * stride);
#pragma GCC unroll 4
          for (size_t v = 0; v < vectors; ++v) multiply(sum[r][v], bytes, columns[v]);
        }
      }
#pragma GCC unroll 8
      for (size_t g = 0; g < groups; ++g) {
        x[g] += 4;
        asm("" : "+r"(x[g]));
      }
    }
    if (i == p.lines) break;
    line = p.line[i] + (p.x - p.line[0]);
  }
  // Hides from gcc 12 what becomes of the sums: it would copy some of them to and fro in the loop.
#pragma GCC unroll 8
  for (size_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (size_t v = 0; v < vectors; ++v) asm("" : "+x"(sum[r][v]));
  end(sum);
}

template <size_t rows, auto multiply = dot>
void store_sums(const Product& p) {
  constexpr size_t vectors = rows <= kWideRows ? 4 : 2;
  for (size_t column = 0; column < kPanel; column += 8 * vectors)
    product_of<rows, vectors, multiply>(p, column, [&](const __m256i(&sum)[rows][vectors]) {
#pragma GCC unroll 8
      for (size_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (size_t v = 0; v < vectors; ++v)
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(p.sums + r * kPanel + column + 8 * v), sum[r][v]);
    });
}

// The destination of a tile's bytes and the constants of its columns; rows of y are n apart.
struct Target {
  const float *scale, *bias;
  const int32_t* zero;
  const uint8_t* floor;
  uint8_t* y;
  size_t n, columns;
};

inline void write(uint8_t* p, __m128i x, size_t n) {
  n >= 16 ? _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x) : write_some(p, x, n);
}

// The sums of sixteen columns, from the column of the panel on, as bytes.
template <size_t rows, size_t vectors>
inline void write(const Target& target, size_t column, const __m256i (&sum)[rows][vectors], size_t first) {
  const auto order = [](__m256i a, __m256i b) { return _mm256_packs_epi32(a, b); };
  const __m256i zero = order(load(target.zero + column), load(target.zero + column + 8));
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(target.floor + column));
  const __m256i floor = _mm256_broadcastsi128_si256(low);
  const size_t left = target.columns - column;
  uint8_t* y = target.y + column;
#pragma GCC unroll 8
  for (size_t r = 0; r < rows; r += 2, y += 2 * target.n) {
    __m256i words[2];
#pragma GCC unroll 2
    for (size_t i = 0; i < 2; ++i) {
      if (r + i == rows) {
        words[1] = words[0];
        continue;
      }
      __m256i q[2];
#pragma GCC unroll 2
      for (size_t v = 0; v < 2; ++v)
        q[v] = _mm256_cvtps_epi32(_mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r + i][first + v]),
                                                  _mm256_loadu_ps(target.scale + column + 8 * v),
                                                  _mm256_loadu_ps(target.bias + column + 8 * v)));
      words[i] = _mm256_adds_epi16(order(q[0], q[1]), zero);
    }
    // each 128 bits hold four bytes of either vector of the first row, then of the second
    const __m256i packed = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words[0], words[1]),
                                                       _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    const __m256i bytes = _mm256_max_epu8(packed, floor);
    write(y, _mm256_castsi256_si128(bytes), left);
    if (r + 1 < rows) write(y + target.n, _mm256_extracti128_si256(bytes, 1), left);
  }
}

// `halves`: how many halves of the panel have columns.
template <size_t rows, size_t halves>
void write_bytes(const Product& p, const Target& target) {
  constexpr size_t vectors = rows <= kWideRows ? 2 * halves : 2;
  for (size_t column = 0; column < 16 * halves; column += 8 * vectors)
    product_of<rows, vectors, dot>(p, column, [&](const __m256i(&sum)[rows][vectors]) {
#pragma GCC unroll 2
      for (size_t v = 0; v < vectors; v += 2) write(target, column + 8 * v, sum, v);
    });
}

struct V : Lanes {
  static constexpr size_t kRows = 6;

  static void product(size_t rows, const Product& p) {
    using Tile = void(const Product&);
    static constexpr Tile* all[kRows] = {store_sums<1>, store_sums<2>, store_sums<3>,
                                         store_sums<4>, store_sums<5>, store_sums<6>};
    all[rows - 1](p);
  }
};

#include "quant_linear_body.inc"
#include "quant_conv_body.inc"

struct W : Shorts {
  static constexpr size_t kRows = 6, kBlock = 6;

  static void product(size_t rows, const Product& p) {
    using Tile = void(const Product&);
    static constexpr Tile* all[kRows] = {store_sums<1, dot_words>, store_sums<2, dot_words>, store_sums<3, dot_words>,
                                         store_sums<4, dot_words>, store_sums<5, dot_words>, store_sums<6, dot_words>};
    all[rows - 1](p);
  }
};

#include "quant_conv_tiles_body.inc"

using Tile = void(const Product&, const Target&);

Tile* tile_of(size_t rows, size_t columns) {
  static constexpr Tile* all[2][V::kRows] = {
      {write_bytes<1, 1>, write_bytes<2, 1>, write_bytes<3, 1>, write_bytes<4, 1>, write_bytes<5, 1>,
       write_bytes<6, 1>},
      {write_bytes<1, 2>, write_bytes<2, 2>, write_bytes<3, 2>, write_bytes<4, 2>, write_bytes<5, 2>,
       write_bytes<6, 2>}};
  return all[columns > 16][rows - 1];
}

#include "quant_linear_bytes_body.inc"

}  // namespace

void quant_conv_avxvnni(const ConvWork& work, const ConvPart& part) {
  conv<V::kRows>(work, part, work.of.floor ? byte_tile : sum_tile);
}

void quant_conv_tiles_avxvnni(const ConvWork& work, const ConvTilesPart& part) { conv_tiles(work, part); }

void quant_linear_avxvnni(const LinearWork& work, size_t first, size_t last) {
  work.floor ? linear_bytes(work, first, last) : linear(work, first, last);
}

int32_t int8_peak_avxvnni(size_t rounds) {
  __m256i sum[12], x = _mm256_set1_epi32(0x01020304), w = _mm256_set1_epi32(0x7f80fe01);
#pragma GCC unroll 12
  for (auto& s : sum) s = _mm256_setzero_si256();
  for (size_t i = 0; i < 4 * rounds; ++i) {  // 4 x 12 x 32 products
    asm("" : "+x"(x), "+x"(w));
#pragma GCC unroll 12
    for (auto& s : sum) dot(s, x, w);
  }
#pragma GCC unroll 12
  for (size_t k = 1; k < 12; ++k) sum[0] = _mm256_xor_si256(sum[0], sum[k]);
  return _mm256_extract_epi32(sum[0], 0);
}

}  // namespace calmclip
