#include "resize.h"

#include <immintrin.h>

#include "resize_ahead.h"

namespace calmclip {

extern "C" ResizeRows resize_rows_avx512;
extern "C" ResizeColumns resize_columns_avx512;

static __m512i broadcast(const int16_t* pair) {
  int32_t both;
  __builtin_memcpy(&both, pair, 4);
  return _mm512_set1_epi32(both);
}

static __m512i finish(__m512i hi, __m512i lo) {
  return _mm512_srai_epi32(_mm512_add_epi32(_mm512_slli_epi32(hi, 16), lo), kWeightBits);
}

// Four rows, 16 bytes each, of which lane l holds row 4 l + `row`.
static __m512i gather(const uint8_t* const* rows, size_t row, size_t offset) {
  __m512i v = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + offset)));
  v = _mm512_inserti32x4(v, _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[4 + row] + offset)), 1);
  v = _mm512_inserti32x4(v, _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[8 + row] + offset)), 2);
  return _mm512_inserti32x4(v, _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[12 + row] + offset)), 3);
}

// Four pixels of the 16 rows -> pixels (0, 1) and (2, 3) of each channel as pairs of 16 bits, a row per 32-bit lane.
static void turn(const uint8_t* const* rows, size_t offset, __m512i order, __m512i* out) {
  const __m512i a = _mm512_shuffle_epi8(gather(rows, 0, offset), order);
  const __m512i b = _mm512_shuffle_epi8(gather(rows, 2, offset), order);
  const __m512i c = _mm512_shuffle_epi8(gather(rows, 1, offset), order);
  const __m512i d = _mm512_shuffle_epi8(gather(rows, 3, offset), order);
  const __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
  const __m512i channel[3] = {_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd),
                              _mm512_unpacklo_epi64(_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d))};
  const __m512i low = _mm512_set1_epi16(255);
  for (int k = 0; k < 3; ++k) {
    _mm512_store_si512(out + k, _mm512_and_si512(channel[k], low));
    _mm512_store_si512(out + 3 + k, _mm512_srli_epi16(channel[k], 8));
  }
}

void resize_rows_avx512(const uint8_t* const* rows, const uint8_t* const* next, size_t pixel_stride, size_t base,
                        size_t width, const Taps* taps, size_t columns, int16_t* scratch, uint8_t* quads,
                        size_t quad_stride) {
  const size_t plane = (columns + kQuadColumns - 1) / kQuadColumns * kQuadColumns * 4;
  const __m512i order = _mm512_broadcast_i32x4(
      pixel_stride == 4 ? _mm_setr_epi8(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, -1, -1, -1, -1)
                        : _mm_setr_epi8(0, 6, 3, 9, 1, 7, 4, 10, 2, 8, 5, 11, -1, -1, -1, -1));
  __m512i* turned = reinterpret_cast<__m512i*>(scratch);  // [pixel pair][channel]
  size_t x = 0;
  for (; x < width && x * pixel_stride + 16 <= width * pixel_stride; x += 4)
    turn(rows, x * pixel_stride, order, turned + x / 2 * 3);
  for (; x < width; x += 4) {  // the last ones, for which 16 bytes are not there to read
    alignas(16) uint8_t copy[kBlockRows][16] = {};
    const uint8_t* copies[kBlockRows];
    const size_t left = (width - x) * pixel_stride;
    for (size_t r = 0; r < kBlockRows; ++r) {
      __builtin_memcpy(copy[r], rows[r] + x * pixel_stride, left < 16 ? left : 16);
      copies[r] = copy[r];
    }
    turn(copies, 0, order, turned + x / 2 * 3);
  }

  const __m512i half = _mm512_set1_epi32(1 << (kWeightBits - 1));
  const size_t wanted = width * pixel_stride < kAhead ? width * pixel_stride : kAhead, groups = (columns + 3) / 4;
  Ahead ahead{next, next + kBlockRows, wanted, 0, (wanted / 64 + 1) * kBlockRows / groups + 1};
  for (size_t i = 0; i < columns; i += 4) {
    ahead.fetch();
    __m512i sum[3][4];
    for (size_t k = 0; k < 4; ++k) {
      const Taps& tap = taps[i + k < columns ? i + k : columns - 1];
      const __m512i* pixel = turned + (tap.first - base) / 2 * 3;
      const int16_t* weight = tap.weights;
      __m512i hi0 = _mm512_setzero_si512(), hi1 = hi0, hi2 = hi0, lo0 = half, lo1 = half, lo2 = half;
      for (size_t p = 0; p < tap.pairs; ++p, pixel += 3, weight += 4) {
        const __m512i hi = broadcast(weight), lo = broadcast(weight + 2);
        hi0 = _mm512_add_epi32(hi0, _mm512_madd_epi16(pixel[0], hi));
        lo0 = _mm512_add_epi32(lo0, _mm512_madd_epi16(pixel[0], lo));
        hi1 = _mm512_add_epi32(hi1, _mm512_madd_epi16(pixel[1], hi));
        lo1 = _mm512_add_epi32(lo1, _mm512_madd_epi16(pixel[1], lo));
        hi2 = _mm512_add_epi32(hi2, _mm512_madd_epi16(pixel[2], hi));
        lo2 = _mm512_add_epi32(lo2, _mm512_madd_epi16(pixel[2], lo));
      }
      sum[0][k] = finish(hi0, lo0);
      sum[1][k] = finish(hi1, lo1);
      sum[2][k] = finish(hi2, lo2);
    }
    for (size_t c = 0; c < 3; ++c) {  // saturating packs clip to 0..255; lane l is quad l, 32 bits a column
      const __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(sum[c][0], sum[c][1]),
                                                _mm512_packs_epi32(sum[c][2], sum[c][3]));
      uint8_t* out = quads + c * plane + i * 4;
      _mm_store_si128(reinterpret_cast<__m128i*>(out), _mm512_castsi512_si128(bytes));
      _mm_store_si128(reinterpret_cast<__m128i*>(out + quad_stride), _mm512_extracti32x4_epi32(bytes, 1));
      _mm_store_si128(reinterpret_cast<__m128i*>(out + 2 * quad_stride), _mm512_extracti32x4_epi32(bytes, 2));
      _mm_store_si128(reinterpret_cast<__m128i*>(out + 3 * quad_stride), _mm512_extracti32x4_epi32(bytes, 3));
    }
  }
}

void resize_columns_avx512(const uint8_t* quads, size_t quad_stride, const Taps* taps, size_t columns, float gain,
                           float bias, float* values, uint8_t* bytes) {
  const __m512i low = _mm512_set1_epi16(255), half = _mm512_set1_epi32(1 << (kWeightBits - 1));
  const __m512i zero = _mm512_setzero_si512(), top = _mm512_set1_epi32(255);
  const __m512 gains = _mm512_set1_ps(gain), biases = _mm512_set1_ps(bias);
  for (size_t i = 0; i < columns; i += 32) {  // what lies past the plane's end is not loaded
    const bool two = columns - i > 16;
    const size_t second = two ? 64 : 0;
    const uint8_t* quad = quads + i * 4;
    const int16_t* weight = taps->weights;
    size_t pairs = taps->pairs;
    __m512i hi0 = zero, hi1 = zero, lo0 = half, lo1 = half;
#define STEP(part0, part1)                                          \
  {                                                                 \
    const __m512i x0 = part0, x1 = part1;                           \
    const __m512i hi = broadcast(weight), lo = broadcast(weight + 2); \
    hi0 = _mm512_add_epi32(hi0, _mm512_madd_epi16(x0, hi));         \
    lo0 = _mm512_add_epi32(lo0, _mm512_madd_epi16(x0, lo));         \
    hi1 = _mm512_add_epi32(hi1, _mm512_madd_epi16(x1, hi));         \
    lo1 = _mm512_add_epi32(lo1, _mm512_madd_epi16(x1, lo));         \
    weight += 4;                                                    \
  }
    if (taps->first % 4 && pairs) {
      const __m512i a = _mm512_load_si512(quad), b = _mm512_load_si512(quad + second);
      STEP(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8))
      quad += quad_stride;
      --pairs;
    }
    for (; pairs >= 2; pairs -= 2, quad += quad_stride) {
      const __m512i a = _mm512_load_si512(quad), b = _mm512_load_si512(quad + second);
      STEP(_mm512_and_si512(a, low), _mm512_and_si512(b, low))
      STEP(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8))
    }
    if (pairs) {
      const __m512i a = _mm512_load_si512(quad), b = _mm512_load_si512(quad + second);
      STEP(_mm512_and_si512(a, low), _mm512_and_si512(b, low))
    }
#undef STEP
    const __m512i byte[2] = {_mm512_min_epi32(_mm512_max_epi32(finish(hi0, lo0), zero), top),
                             _mm512_min_epi32(_mm512_max_epi32(finish(hi1, lo1), zero), top)};
    for (size_t k = 0; k < (two ? 2 : 1); ++k) {
      const size_t at = i + 16 * k, left = columns - at;
      const __mmask16 mask = left >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << left) - 1);
      if (values) {
        _mm_prefetch(reinterpret_cast<const char*>(values + at + columns), _MM_HINT_T0);  // where the next row goes
        _mm512_mask_storeu_ps(values + at, mask,
                              _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(byte[k]), gains), biases));
      } else {
        _mm_mask_storeu_epi8(bytes + at, mask, _mm512_cvtepi32_epi8(byte[k]));
      }
    }
  }
}

}  // namespace calmclip
