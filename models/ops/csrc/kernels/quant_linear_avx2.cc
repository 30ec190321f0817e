#include "quant_linear.h"

#include <immintrin.h>

#include <cstring>

#include "activation_curve.h"
#include "quant_conv.h"

namespace calmclip {

extern "C" QuantLinear quant_linear_avx2;
extern "C" QuantConv quant_conv_avx2;
extern "C" QuantConvTiles quant_conv_tiles_avx2;
extern "C" Int8Peak int8_peak_avx2;

namespace {

// Bytes are widened to 16 bits first, because the instruction for byte products adds two products in 16 bits and
// saturates.
inline __m256i words(const int8_t* w) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
}

inline __m256i dot(__m256i sum, __m256i x, __m256i w) { return _mm256_add_epi32(sum, _mm256_madd_epi16(x, w)); }

// Sixteen columns of a tile. Each column has two sums, for the first two and the last two of four rows of w.
template <size_t rows>
void product_of(const Product& p, size_t column) {
  __m256i sum[rows][4];
#pragma GCC unroll 3
  for (size_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (size_t c = 0; c < 4; ++c)
      sum[r][c] = _mm256_cvtepu32_epi64(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(p.from + r * p.from_stride + column + 4 * c)));
  const int8_t *w = p.panel + 4 * column, *ahead = p.ahead;
  for (size_t i = 0; i < p.steps; ++i, w += 4 * kPanel, ahead += p.ahead_step) {
    _mm_prefetch(ahead, _MM_HINT_T1);
    _mm_prefetch(ahead + 64, _MM_HINT_T1);
    __m256i x[rows];
#pragma GCC unroll 3
    for (size_t r = 0; r < rows; ++r) {
      int32_t four;
      std::memcpy(&four, p.x + r * p.stride + 4 * i, sizeof four);
      x[r] = _mm256_cvtepu8_epi16(_mm_set1_epi32(four));
    }
#pragma GCC unroll 4
    for (size_t c = 0; c < 4; ++c) {
      const __m256i four_columns = words(w + 16 * c);
#pragma GCC unroll 3
      for (size_t r = 0; r < rows; ++r) sum[r][c] = dot(sum[r][c], x[r], four_columns);
    }
  }
#pragma GCC unroll 3
  for (size_t r = 0; r < rows; ++r)
#pragma GCC unroll 2
    for (size_t c = 0; c < 4; c += 2) {
      const __m256i both = _mm256_hadd_epi32(sum[r][c], sum[r][c + 1]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p.sums + r * kPanel + column + 4 * c),
                          _mm256_permute4x64_epi64(both, 0xd8));
    }
}

struct V {
  using F = __m256;
  using I = __m256i;
  static constexpr size_t kWidth = 8, kRows = 3;

  static void product(size_t rows, const Product& p) {
    for (size_t column = 0; column < kPanel; column += 16)
      rows == 1 ? product_of<1>(p, column) : rows == 2 ? product_of<2>(p, column) : product_of<3>(p, column);
  }

  // In the order of the words that `store` adds it to.
  struct Zero {
    __m256i words[2];
    explicit Zero(const int32_t* zero)
        : words{_mm256_packs_epi32(load(zero), load(zero + 8)), _mm256_packs_epi32(load(zero + 16), load(zero + 24))} {}
  };
  struct Floored : Zero {
    __m256i floor;
    Floored(const int32_t* zero, const uint8_t* floor)
        : Zero(zero), floor(load(reinterpret_cast<const int32_t*>(floor))) {}
  };
  static F set(float v) { return _mm256_set1_ps(v); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static I load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static I bytes(const I* v, const Zero& zero) {
    const I a = _mm256_adds_epi16(_mm256_packs_epi32(v[0], v[1]), zero.words[0]);
    const I b = _mm256_adds_epi16(_mm256_packs_epi32(v[2], v[3]), zero.words[1]);
    // each 128 bits hold four bytes of every vector
    return _mm256_permutevar8x32_epi32(_mm256_packus_epi16(a, b), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }
  static void store(uint8_t* p, I bytes) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bytes); }
  static void store(uint8_t* p, const I* v, const Zero& zero) { store(p, bytes(v, zero)); }
  static void store(uint8_t* p, const I* v, const Floored& zero) {
    store(p, _mm256_max_epu8(bytes(v, zero), zero.floor));
  }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F fused(F a, F b, F c) { return fma(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F absolute(F v) { return _mm256_andnot_ps(set(-0.0f), v); }
  static F to_float(I v) { return _mm256_cvtepi32_ps(v); }
  static I to_int(F v) { return _mm256_cvtps_epi32(v); }

  struct Table {
    const float (&c)[4][kIntervals];
    explicit Table(const float (&coefficients)[4][kIntervals]) : c(coefficients) {}
    void find(F v, F (&result)[4]) const {
      const I bits = _mm256_srli_epi32(_mm256_castps_si256(v), kIntervalShift);
      const I i = _mm256_and_si256(bits, _mm256_set1_epi32(kIntervals - 1));
      for (size_t k = 0; k < 4; ++k) result[k] = _mm256_i32gather_ps(c[k], i, sizeof(float));
    }
  };
};

#include "quant_linear_body.inc"
#include "quant_conv_body.inc"

struct W {
  using S = __m256i;
  static constexpr size_t kShorts = 16, kRows = 3, kBlock = 6;
  static S bytes(const uint8_t* p, S zero) {
    return _mm256_sub_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), zero);
  }
  static S set(int16_t x) { return _mm256_set1_epi16(x); }
  static S add16(S a, S b) { return _mm256_add_epi16(a, b); }
  static S sub16(S a, S b) { return _mm256_sub_epi16(a, b); }
  template <int factor>
  static S times16(S x) {
    return _mm256_slli_epi16(x, factor / 2);  // 2 and 4
  }
  static void store16(int16_t* p, S x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }

  template <size_t rows>
  static void product_of(const Product& p) {
    __m256i sum[rows][4] = {};
    const int8_t *w = p.panel, *ahead = p.ahead;
    for (size_t i = 0; i < p.steps; ++i, w += 4 * kPanel, ahead += p.ahead_step) {
      _mm_prefetch(ahead, _MM_HINT_T1);
      _mm_prefetch(ahead + 64, _MM_HINT_T1);
#pragma GCC unroll 3
      for (size_t r = 0; r < rows; ++r) {
        int32_t two;
        std::memcpy(&two, p.x + r * p.stride + 4 * i, sizeof two);
        const __m256i x = _mm256_set1_epi32(two);
#pragma GCC unroll 4
        for (size_t c = 0; c < 4; ++c)
          sum[r][c] = dot(sum[r][c], x, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w) + c));
      }
    }
#pragma GCC unroll 3
    for (size_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (size_t c = 0; c < 4; ++c) store32(p.sums + r * kPanel + 8 * c, sum[r][c]);
  }
  static void product(size_t rows, const Product& p) {
    rows == 1 ? product_of<1>(p) : rows == 2 ? product_of<2>(p) : product_of<3>(p);
  }

  static V::I add32(V::I a, V::I b) { return _mm256_add_epi32(a, b); }
  static V::I sub32(V::I a, V::I b) { return _mm256_sub_epi32(a, b); }
  template <int factor>
  static V::I times32(V::I x) {
    return _mm256_slli_epi32(x, factor == 8 ? 3 : factor / 2);
  }
  static V::I quotient(V::I x) {
    return _mm256_srai_epi32(_mm256_mullo_epi32(x, _mm256_set1_epi32(static_cast<int>(kNinth))), 6);
  }
  static void store32(int32_t* p, V::I x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
};

#include "quant_conv_tiles_body.inc"

}  // namespace

void quant_conv_avx2(const ConvWork& work, const ConvPart& part) { conv<12>(work, part, sum_tile); }

void quant_conv_tiles_avx2(const ConvWork& work, const ConvTilesPart& part) { conv_tiles(work, part); }

void quant_linear_avx2(const LinearWork& work, size_t first, size_t last) { linear(work, first, last); }

int32_t int8_peak_avx2(size_t rounds) {
  __m256i sum[12], x = _mm256_set1_epi16(3), w = _mm256_set1_epi16(-5);
  for (auto& s : sum) s = _mm256_setzero_si256();
  for (size_t i = 0; i < 8 * rounds; ++i) {  // 8 x 12 x 16 products
    asm("" : "+x"(x), "+x"(w));              // without it the compiler computes one product
#pragma GCC unroll 12
    for (auto& s : sum) s = dot(s, x, w);
  }
  for (size_t k = 1; k < 12; ++k) sum[0] = _mm256_xor_si256(sum[0], sum[k]);
  return _mm256_extract_epi32(sum[0], 0);
}

}  // namespace calmclip
