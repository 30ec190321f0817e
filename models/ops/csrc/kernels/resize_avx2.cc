#include "resize.h"

#include <immintrin.h>

#include "resize_ahead.h"

namespace calmclip {

extern "C" ResizeRows resize_rows_avx2;
extern "C" ResizeColumns resize_columns_avx2;

static __m256i broadcast(const int16_t* pair) {
  int32_t both;
  __builtin_memcpy(&both, pair, 4);
  return _mm256_set1_epi32(both);
}

static __m256i finish(__m256i hi, __m256i lo) {
  return _mm256_srai_epi32(_mm256_add_epi32(_mm256_slli_epi32(hi, 16), lo), kWeightBits);
}

// Two rows, 16 bytes each, of which lane l holds row 4 l + `row`.
static __m256i gather(const uint8_t* const* rows, size_t row, size_t offset) {
  const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + offset));
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[4 + row] + offset));
  return _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
}

// Four pixels of 8 rows -> pixels (0, 1) and (2, 3) of each channel as pairs of 16 bits, a row per 32-bit lane.
static void turn(const uint8_t* const* rows, size_t offset, __m256i order, __m256i* out) {
  const __m256i a = _mm256_shuffle_epi8(gather(rows, 0, offset), order);
  const __m256i b = _mm256_shuffle_epi8(gather(rows, 2, offset), order);
  const __m256i c = _mm256_shuffle_epi8(gather(rows, 1, offset), order);
  const __m256i d = _mm256_shuffle_epi8(gather(rows, 3, offset), order);
  const __m256i ab = _mm256_unpacklo_epi32(a, b), cd = _mm256_unpacklo_epi32(c, d);
  const __m256i channel[3] = {_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd),
                              _mm256_unpacklo_epi64(_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d))};
  const __m256i low = _mm256_set1_epi16(255);
  for (int k = 0; k < 3; ++k) {
    _mm256_store_si256(out + k, _mm256_and_si256(channel[k], low));
    _mm256_store_si256(out + 3 + k, _mm256_srli_epi16(channel[k], 8));
  }
}

void resize_rows_avx2(const uint8_t* const* rows, const uint8_t* const* next, size_t pixel_stride, size_t base,
                      size_t width, const Taps* taps, size_t columns, int16_t* scratch, uint8_t* quads,
                      size_t quad_stride) {
  const size_t plane = (columns + kQuadColumns - 1) / kQuadColumns * kQuadColumns * 4;
  const __m256i order = _mm256_broadcastsi128_si256(
      pixel_stride == 4 ? _mm_setr_epi8(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, -1, -1, -1, -1)
                        : _mm_setr_epi8(0, 6, 3, 9, 1, 7, 4, 10, 2, 8, 5, 11, -1, -1, -1, -1));
  const __m256i half = _mm256_set1_epi32(1 << (kWeightBits - 1));
  __m256i* turned = reinterpret_cast<__m256i*>(scratch);  // [pixel pair][channel]
  for (size_t part = 0; part < 2; ++part, rows += 8, quads += 2 * quad_stride) {
    size_t x = 0;
    for (; x < width && x * pixel_stride + 16 <= width * pixel_stride; x += 4)
      turn(rows, x * pixel_stride, order, turned + x / 2 * 3);
    for (; x < width; x += 4) {  // the last ones, for which 16 bytes are not there to read
      alignas(16) uint8_t copy[8][16] = {};
      const uint8_t* copies[8];
      const size_t left = (width - x) * pixel_stride;
      for (size_t r = 0; r < 8; ++r) {
        __builtin_memcpy(copy[r], rows[r] + x * pixel_stride, left < 16 ? left : 16);
        copies[r] = copy[r];
      }
      turn(copies, 0, order, turned + x / 2 * 3);
    }

    const size_t wanted = width * pixel_stride < kAhead ? width * pixel_stride : kAhead, groups = (columns + 3) / 4;
    Ahead ahead{next + 8 * part, next + 8 * part + 8, wanted, 0, (wanted / 64 + 1) * 8 / groups + 1};
    for (size_t i = 0; i < columns; i += 4) {
      ahead.fetch();
      __m256i sum[3][4];
      for (size_t k = 0; k < 4; ++k) {
        const Taps& tap = taps[i + k < columns ? i + k : columns - 1];
        const __m256i* pixel = turned + (tap.first - base) / 2 * 3;
        const int16_t* weight = tap.weights;
        __m256i hi0 = _mm256_setzero_si256(), hi1 = hi0, hi2 = hi0, lo0 = half, lo1 = half, lo2 = half;
        for (size_t p = 0; p < tap.pairs; ++p, pixel += 3, weight += 4) {
          const __m256i hi = broadcast(weight), lo = broadcast(weight + 2);
          hi0 = _mm256_add_epi32(hi0, _mm256_madd_epi16(pixel[0], hi));
          lo0 = _mm256_add_epi32(lo0, _mm256_madd_epi16(pixel[0], lo));
          hi1 = _mm256_add_epi32(hi1, _mm256_madd_epi16(pixel[1], hi));
          lo1 = _mm256_add_epi32(lo1, _mm256_madd_epi16(pixel[1], lo));
          hi2 = _mm256_add_epi32(hi2, _mm256_madd_epi16(pixel[2], hi));
          lo2 = _mm256_add_epi32(lo2, _mm256_madd_epi16(pixel[2], lo));
        }
        sum[0][k] = finish(hi0, lo0);
        sum[1][k] = finish(hi1, lo1);
        sum[2][k] = finish(hi2, lo2);
      }
      for (size_t c = 0; c < 3; ++c) {  // saturating packs clip to 0..255; lane l is quad l, 32 bits a column
        const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(sum[c][0], sum[c][1]),
                                                  _mm256_packs_epi32(sum[c][2], sum[c][3]));
        uint8_t* out = quads + c * plane + i * 4;
        _mm_store_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(bytes));
        _mm_store_si128(reinterpret_cast<__m128i*>(out + quad_stride), _mm256_extracti128_si256(bytes, 1));
      }
    }
  }
}

void resize_columns_avx2(const uint8_t* quads, size_t quad_stride, const Taps* taps, size_t columns, float gain,
                         float bias, float* values, uint8_t* bytes) {
  const __m256i low = _mm256_set1_epi16(255), half = _mm256_set1_epi32(1 << (kWeightBits - 1));
  const __m256i zero = _mm256_setzero_si256(), top = _mm256_set1_epi32(255);
  const __m256 gains = _mm256_set1_ps(gain), biases = _mm256_set1_ps(bias);
  for (size_t i = 0; i < columns; i += 16) {  // a plane is padded to 16 columns
    const uint8_t* quad = quads + i * 4;
    const int16_t* weight = taps->weights;
    size_t pairs = taps->pairs;
    __m256i hi0 = zero, hi1 = zero, lo0 = half, lo1 = half;
#define STEP(part0, part1)                                          \
  {                                                                 \
    const __m256i x0 = part0, x1 = part1;                           \
    const __m256i hi = broadcast(weight), lo = broadcast(weight + 2); \
    hi0 = _mm256_add_epi32(hi0, _mm256_madd_epi16(x0, hi));         \
    lo0 = _mm256_add_epi32(lo0, _mm256_madd_epi16(x0, lo));         \
    hi1 = _mm256_add_epi32(hi1, _mm256_madd_epi16(x1, hi));         \
    lo1 = _mm256_add_epi32(lo1, _mm256_madd_epi16(x1, lo));         \
    weight += 4;                                                    \
  }
#define LOAD                                                                    \
  const __m256i a = _mm256_load_si256(reinterpret_cast<const __m256i*>(quad)), \
                b = _mm256_load_si256(reinterpret_cast<const __m256i*>(quad + 32));
    if (taps->first % 4 && pairs) {
      LOAD STEP(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8))
      quad += quad_stride;
      --pairs;
    }
    for (; pairs >= 2; pairs -= 2, quad += quad_stride) {
      LOAD STEP(_mm256_and_si256(a, low), _mm256_and_si256(b, low))
      STEP(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8))
    }
    if (pairs) {
      LOAD STEP(_mm256_and_si256(a, low), _mm256_and_si256(b, low))
    }
#undef LOAD
#undef STEP
    const __m256i byte0 = _mm256_min_epi32(_mm256_max_epi32(finish(hi0, lo0), zero), top);
    const __m256i byte1 = _mm256_min_epi32(_mm256_max_epi32(finish(hi1, lo1), zero), top);
    const size_t left = columns - i < 16 ? columns - i : 16;
    if (values) {
      _mm_prefetch(reinterpret_cast<const char*>(values + i + columns), _MM_HINT_T0);  // where the next row goes
      alignas(32) float line[16];
      float* out = left == 16 ? values + i : line;
      _mm256_storeu_ps(out, _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(byte0), gains), biases));
      _mm256_storeu_ps(out + 8, _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(byte1), gains), biases));
      if (left < 16) __builtin_memcpy(values + i, line, left * sizeof(float));
    } else {
      alignas(32) int32_t line[16];
      _mm256_store_si256(reinterpret_cast<__m256i*>(line), byte0);
      _mm256_store_si256(reinterpret_cast<__m256i*>(line + 8), byte1);
      for (size_t k = 0; k < left; ++k) bytes[i + k] = static_cast<uint8_t>(line[k]);
    }
  }
}

}  // namespace calmclip
