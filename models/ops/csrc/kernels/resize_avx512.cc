#include "resize.h"

#include <immintrin.h>

namespace calmclip {

extern "C" ResizeRows resize_rows_avx512;
extern "C" ResizeColumns resize_columns_avx512;

namespace {

struct V {
  using I = __m512i;
  static constexpr size_t kLanes = 16;

  static I set(int32_t v) { return _mm512_set1_epi32(v); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I madd(I x, I w) { return _mm512_madd_epi16(x, w); }
  static I clip(I x) { return _mm512_min_epi32(_mm512_max_epi32(x, set(0)), set(255)); }
  static I finish(I hi, I lo) { return _mm512_srai_epi32(add(_mm512_slli_epi32(hi, 16), lo), kWeightBits); }
  static I low_bytes(I x) { return _mm512_and_si512(x, _mm512_set1_epi16(255)); }
  static I high_bytes(I x) { return _mm512_srli_epi16(x, 8); }
  static I shuffle(I x, I order) { return _mm512_shuffle_epi8(x, order); }
  static I unpack_low32(I a, I b) { return _mm512_unpacklo_epi32(a, b); }
  static I unpack_high32(I a, I b) { return _mm512_unpackhi_epi32(a, b); }
  static I unpack_low64(I a, I b) { return _mm512_unpacklo_epi64(a, b); }
  static I unpack_high64(I a, I b) { return _mm512_unpackhi_epi64(a, b); }
  static I pack(const I* x) { return _mm512_packus_epi16(_mm512_packs_epi32(x[0], x[1]), _mm512_packs_epi32(x[2], x[3])); }
  static I repeat(__m128i x) { return _mm512_broadcast_i32x4(x); }
  static I gather(const uint8_t* const* rows, size_t row, size_t offset) {
    I v = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + offset)));
    v = _mm512_inserti32x4(v, _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[4 + row] + offset)), 1);
    v = _mm512_inserti32x4(v, _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[8 + row] + offset)), 2);
    return _mm512_inserti32x4(v, _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[12 + row] + offset)), 3);
  }
  static I load(const uint8_t* p) { return _mm512_load_si512(p); }
  static void store(I* p, I x) { _mm512_store_si512(p, x); }
  static void store_lanes(uint8_t* p, size_t step, I x) {
    _mm_store_si128(reinterpret_cast<__m128i*>(p), _mm512_castsi512_si128(x));
    _mm_store_si128(reinterpret_cast<__m128i*>(p + step), _mm512_extracti32x4_epi32(x, 1));
    _mm_store_si128(reinterpret_cast<__m128i*>(p + 2 * step), _mm512_extracti32x4_epi32(x, 2));
    _mm_store_si128(reinterpret_cast<__m128i*>(p + 3 * step), _mm512_extracti32x4_epi32(x, 3));
  }
  static __mmask16 first(size_t n) { return static_cast<__mmask16>(n >= kLanes ? 0xffff : (1u << n) - 1); }
  static void store(float* p, I x, float gain, float bias, size_t n) {
    const __m512 y =
        _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(x), _mm512_set1_ps(gain)), _mm512_set1_ps(bias));
    _mm512_mask_storeu_ps(p, first(n), y);
  }
  static void store(uint8_t* p, I x, size_t n) { _mm_mask_storeu_epi8(p, first(n), _mm512_cvtepi32_epi8(x)); }
};

#include "resize_body.inc"

}  // namespace

void resize_rows_avx512(const uint8_t* const* rows, const uint8_t* const* next, size_t pixel_stride, size_t base,
                        size_t width, const Taps* taps, size_t columns, int16_t* scratch, uint8_t* quads,
                        size_t quad_stride) {
  resize_rows(rows, next, pixel_stride, base, width, taps, columns, scratch, quads, quad_stride);
}

void resize_columns_avx512(const uint8_t* quads, size_t quad_stride, const Taps* taps, size_t columns, float gain,
                           float bias, float* values, uint8_t* bytes) {
  resize_columns(quads, quad_stride, taps, columns, gain, bias, values, bytes);
}

}  // namespace calmclip
