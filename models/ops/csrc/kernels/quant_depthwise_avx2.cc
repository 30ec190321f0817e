#include "quant_depthwise.h"

#include <immintrin.h>

#include <cstring>

namespace calmclip {

extern "C" QuantDepthwise quant_depthwise_avx2;

namespace {

// Bytes are widened to 16 bits first, because the instruction for byte products adds two products in 16 bits and
// saturates. One word holds the bytes of rows 0 and 2 of a lane, the other those of rows 1 and 3.
struct Words {
  __m256i even, odd;
};

struct V {
  using F = __m256;
  using I = __m256i;
  using Bytes = __m256i;
  using X = Words;
  using W = Words;
  static constexpr size_t kBytes = 32, kTile = 2;

  static Bytes load(const uint8_t* p, size_t count) {
    if (count == kBytes) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    alignas(32) uint8_t some[kBytes] = {};
    std::memcpy(some, p, count);
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(some));
  }
  static void interleave(const Bytes* b, uint8_t* p) {
    const __m256i low = _mm256_unpacklo_epi8(b[0], b[1]), high = _mm256_unpackhi_epi8(b[0], b[1]);
    const __m256i low2 = _mm256_unpacklo_epi8(b[2], b[3]), high2 = _mm256_unpackhi_epi8(b[2], b[3]);
    store(p, _mm256_unpacklo_epi16(low, low2));
    store(p + 32, _mm256_unpackhi_epi16(low, low2));
    store(p + 64, _mm256_unpacklo_epi16(high, high2));
    store(p + 96, _mm256_unpackhi_epi16(high, high2));
  }
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

  static F set(float v) { return _mm256_set1_ps(v); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static I load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(void* p, I v) { _mm256_store_si256(static_cast<__m256i*>(p), v); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F to_float(I v) { return _mm256_cvtepi32_ps(v); }
  static I to_int(F v) { return _mm256_cvtps_epi32(v); }

  struct Zero {  // in the order of the words that `store` adds it to
    __m256i words[2];
    explicit Zero(const int32_t* p)
        : words{_mm256_packs_epi32(load(p), load(p + 16)), _mm256_packs_epi32(load(p + 32), load(p + 48))} {}
  };
  static void store(uint8_t* p, const I* v, const Zero& zero, size_t count) {
    const __m256i a = _mm256_adds_epi16(_mm256_packs_epi32(v[0], v[1]), zero.words[0]);
    const __m256i b = _mm256_adds_epi16(_mm256_packs_epi32(v[2], v[3]), zero.words[1]);
    const __m256i bytes = _mm256_packus_epi16(a, b);
    if (count == kBytes) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bytes);
    alignas(32) uint8_t some[kBytes];
    store(some, bytes);
    std::memcpy(p, some, count);
  }
};

#include "quant_depthwise_body.inc"

}  // namespace

void quant_depthwise_avx2(const DepthwiseWork& work, size_t first, size_t last) { depthwise<V, V>(work, first, last); }

}  // namespace calmclip
