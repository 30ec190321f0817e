#include "quant_depthwise.h"

#include <immintrin.h>

#include <cstring>

namespace calmclip {

extern "C" QuantDepthwise quant_depthwise_avx2;

namespace {

#include "quant_depthwise_256.inc"

// Bytes are widened to 16 bits first, because the instruction for byte products adds two products in 16 bits and
// saturates. One word holds the bytes of rows 0 and 2 of a lane, the other those of rows 1 and 3.
struct Words {
  __m256i even, odd;
};

struct V : Lanes {
  using X = Words;
  using W = Words;
  static constexpr size_t kTile = 2;

  static X x(const uint8_t* p) {
    const __m256i four = _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_and_si256(four, _mm256_set1_epi16(255)), _mm256_srli_epi16(four, 8)};
  }
  static W w(const int8_t* p) {
    const __m256i four = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8), _mm256_srai_epi16(four, 8)};
  }
  static void dot(I& sum, const X& x, const W& w) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x.even, w.even));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x.odd, w.odd));
  }
};

#include "quant_depthwise_body.inc"

}  // namespace

void quant_depthwise_avx2(const DepthwiseWork& work, size_t first, size_t last) { depthwise<V, V>(work, first, last); }

}  // namespace calmclip
