#include "resize.h"

#include <immintrin.h>

namespace calmclip {

extern "C" ResizeRows resize_rows_avx2;
extern "C" ResizeColumns resize_columns_avx2;

namespace {

struct V {
  using I = __m256i;
  static constexpr size_t kLanes = 8;

  static I set(int32_t v) { return _mm256_set1_epi32(v); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I madd(I x, I w) { return _mm256_madd_epi16(x, w); }
  static I clip(I x) { return _mm256_min_epi32(_mm256_max_epi32(x, set(0)), set(255)); }
  static I finish(I hi, I lo) { return _mm256_srai_epi32(add(_mm256_slli_epi32(hi, 16), lo), kWeightBits); }
  static I low_bytes(I x) { return _mm256_and_si256(x, _mm256_set1_epi16(255)); }
  static I high_bytes(I x) { return _mm256_srli_epi16(x, 8); }
  static I shuffle(I x, I order) { return _mm256_shuffle_epi8(x, order); }
  static I unpack_low32(I a, I b) { return _mm256_unpacklo_epi32(a, b); }
  static I unpack_high32(I a, I b) { return _mm256_unpackhi_epi32(a, b); }
  static I unpack_low64(I a, I b) { return _mm256_unpacklo_epi64(a, b); }
  static I unpack_high64(I a, I b) { return _mm256_unpackhi_epi64(a, b); }
  static I pack(const I* x) { return _mm256_packus_epi16(_mm256_packs_epi32(x[0], x[1]), _mm256_packs_epi32(x[2], x[3])); }
  static I repeat(__m128i x) { return _mm256_broadcastsi128_si256(x); }
  static I gather(const uint8_t* const* rows, size_t row, size_t offset) {
    const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + offset));
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[4 + row] + offset));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
  }
  static I load(const uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const I*>(p)); }
  static void store(I* p, I x) { _mm256_store_si256(p, x); }
  static void store_lanes(uint8_t* p, size_t step, I x) {
    _mm_store_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(x));
    _mm_store_si128(reinterpret_cast<__m128i*>(p + step), _mm256_extracti128_si256(x, 1));
  }
  static void store(float* p, I x, float gain, float bias, size_t n) {
    const __m256 y =
        _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(x), _mm256_set1_ps(gain)), _mm256_set1_ps(bias));
    if (n >= kLanes) return _mm256_storeu_ps(p, y);
    alignas(32) float line[kLanes];
    _mm256_store_ps(line, y);
    __builtin_memcpy(p, line, n * sizeof(float));
  }
  static void store(uint8_t* p, I x, size_t n) {
    alignas(32) int32_t line[kLanes];
    _mm256_store_si256(reinterpret_cast<I*>(line), x);
    for (size_t k = 0; k < (n < kLanes ? n : kLanes); ++k) p[k] = static_cast<uint8_t>(line[k]);
  }
};

#include "resize_body.inc"

}  // namespace

void resize_rows_avx2(const uint8_t* const* rows, const uint8_t* const* next, size_t pixel_stride, size_t base,
                      size_t width, const Taps* taps, size_t columns, int16_t* scratch, uint8_t* quads,
                      size_t quad_stride) {
  resize_rows(rows, next, pixel_stride, base, width, taps, columns, scratch, quads, quad_stride);
}

void resize_columns_avx2(const uint8_t* quads, size_t quad_stride, const Taps* taps, size_t columns, float gain,
                         float bias, float* values, uint8_t* bytes) {
  resize_columns(quads, quad_stride, taps, columns, gain, bias, values, bytes);
}

}  // namespace calmclip
