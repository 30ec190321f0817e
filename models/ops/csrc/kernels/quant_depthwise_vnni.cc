#include "quant_depthwise.h"

#include <immintrin.h>

namespace calmclip {

extern "C" QuantDepthwise quant_depthwise_vnni;

namespace {

struct Whole {
  using F = __m512;
  using I = __m512i;
  using Bytes = __m512i;
  using X = __m512i;
  using W = __m512i;
  static constexpr size_t kBytes = 64, kTile = 4;

  static Bytes load(const uint8_t* p, size_t count) { return _mm512_maskz_loadu_epi8(mask(count), p); }
  static void interleave(const Bytes* b, uint8_t* p) {
    const __m512i low = _mm512_unpacklo_epi8(b[0], b[1]), high = _mm512_unpackhi_epi8(b[0], b[1]);
    const __m512i low2 = _mm512_unpacklo_epi8(b[2], b[3]), high2 = _mm512_unpackhi_epi8(b[2], b[3]);
    _mm512_store_si512(p, _mm512_unpacklo_epi16(low, low2));
    _mm512_store_si512(p + 64, _mm512_unpackhi_epi16(low, low2));
    _mm512_store_si512(p + 128, _mm512_unpacklo_epi16(high, high2));
    _mm512_store_si512(p + 192, _mm512_unpackhi_epi16(high, high2));
  }
  static X x(const uint8_t* p) { return _mm512_load_si512(p); }
  static W w(const int8_t* p) { return _mm512_loadu_si512(p); }
  // Not the intrinsic: see quant_linear_vnni.cc.
  static void dot(I& sum, X x, W w) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w)); }

  static F set(float v) { return _mm512_set1_ps(v); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static I load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fused(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static I to_int(F v) { return _mm512_cvtps_epi32(v); }

  struct Zero {  // in the order of the words that `store` adds it to
    __m512i words[2];
    explicit Zero(const int32_t* p)
        : words{_mm512_packs_epi32(load(p), load(p + 16)), _mm512_packs_epi32(load(p + 32), load(p + 48))} {}
  };
  static void store(uint8_t* p, const I* v, const Zero& zero, size_t count) {
    const __m512i a = _mm512_adds_epi16(_mm512_packs_epi32(v[0], v[1]), zero.words[0]);
    const __m512i b = _mm512_adds_epi16(_mm512_packs_epi32(v[2], v[3]), zero.words[1]);
    const __m512i bytes = _mm512_packus_epi16(a, b);
    count == kBytes ? _mm512_storeu_si512(p, bytes) : _mm512_mask_storeu_epi8(p, mask(count), bytes);
  }

 private:
  static __mmask64 mask(size_t count) { return ~__mmask64{0} >> (kBytes - count); }
};

// The same with vectors of half the length, for the remaining channels.
struct Half {
  using F = __m256;
  using I = __m256i;
  using Bytes = __m256i;
  using X = __m256i;
  using W = __m256i;
  static constexpr size_t kBytes = 32, kTile = 4;

  static Bytes load(const uint8_t* p, size_t count) { return _mm256_maskz_loadu_epi8(mask(count), p); }
  static void interleave(const Bytes* b, uint8_t* p) {
    const __m256i low = _mm256_unpacklo_epi8(b[0], b[1]), high = _mm256_unpackhi_epi8(b[0], b[1]);
    const __m256i low2 = _mm256_unpacklo_epi8(b[2], b[3]), high2 = _mm256_unpackhi_epi8(b[2], b[3]);
    store(p, _mm256_unpacklo_epi16(low, low2));
    store(p + 32, _mm256_unpackhi_epi16(low, low2));
    store(p + 64, _mm256_unpacklo_epi16(high, high2));
    store(p + 96, _mm256_unpackhi_epi16(high, high2));
  }
  static X x(const uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
  static W w(const int8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void dot(I& sum, X x, W w) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w)); }

  static F set(float v) { return _mm256_set1_ps(v); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static I load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(void* p, I v) { _mm256_store_si256(static_cast<__m256i*>(p), v); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fused(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F to_float(I v) { return _mm256_cvtepi32_ps(v); }
  static I to_int(F v) { return _mm256_cvtps_epi32(v); }

  struct Zero {
    __m256i words[2];
    explicit Zero(const int32_t* p)
        : words{_mm256_packs_epi32(load(p), load(p + 16)), _mm256_packs_epi32(load(p + 32), load(p + 48))} {}
  };
  static void store(uint8_t* p, const I* v, const Zero& zero, size_t count) {
    const __m256i a = _mm256_adds_epi16(_mm256_packs_epi32(v[0], v[1]), zero.words[0]);
    const __m256i b = _mm256_adds_epi16(_mm256_packs_epi32(v[2], v[3]), zero.words[1]);
    _mm256_mask_storeu_epi8(p, mask(count), _mm256_packus_epi16(a, b));
  }

 private:
  static __mmask32 mask(size_t count) { return ~__mmask32{0} >> (kBytes - count); }
};

#include "quant_depthwise_body.inc"

}  // namespace

void quant_depthwise_vnni(const DepthwiseWork& work, size_t first, size_t last) {
  depthwise<Whole, Half>(work, first, last);
}

}  // namespace calmclip
