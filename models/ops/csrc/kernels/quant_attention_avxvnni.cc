#include "quant_attention.h"

#include <immintrin.h>

#include <cfloat>
#include <climits>
#include <cstring>

namespace calmclip {

extern "C" QuantAttention quant_attention_avxvnni;

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 64")
#endif

namespace {

#include "dot_avxvnni.inc"
#include "quant_attention_256.inc"

struct V : Lanes {
  using K = int8_t;
  static constexpr size_t kPack = 4, kTile = 12, kWords = 16;

  static void dot(I& sum, I x, const K* k) {
    int32_t four;
    std::memcpy(&four, k, sizeof four);
    calmclip::dot(sum, x, set(four));
  }
  static void spread(I& sum, I x, const K* k) {
    calmclip::dot(sum, x, _mm256_loadu_si256(reinterpret_cast<const I*>(k)));
  }

  static I count(I sum, I p) {
    calmclip::dot(sum, p, _mm256_set1_epi8(1));
    return sum;
  }
  // The lowest bytes of four words; that of the first word is the lowest. Those of p are at most 255, so the next is 0.
  static I pack(const I (&p)[4]) {
    const I low = _mm256_or_si256(p[0], _mm256_slli_epi32(p[1], 8));
    const I high = _mm256_or_si256(p[2], _mm256_slli_epi32(p[3], 8));
    return _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xaa);
  }

  // The first n of 32 bytes minus 128, the others 0.
  static I less(const uint8_t* p, size_t n) {
    const I x = _mm256_xor_si256(read_bytes(p, n), _mm256_set1_epi8(-128));
    if (n >= 32) return x;
    const I at = _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23,
                                  24, 25, 26, 27, 28, 29, 30, 31);
    return _mm256_and_si256(x, _mm256_cmpgt_epi8(_mm256_set1_epi8(static_cast<char>(n)), at));
  }

  static void keep(const uint8_t* k, size_t step, size_t rows, size_t n, K* out, int32_t* sums, bool more) {
    const I ones = _mm256_set1_epi8(1), none = _mm256_setzero_si256();
    for (size_t s = 0; s < rows; ++s, k += step, out += 64) {
      const I x[2] = {less(k, n), n > 32 ? less(k + 32, n - 32) : none};
      I eight = none;
      for (size_t h = 0; h < 2; ++h) {
        calmclip::dot(eight, ones, x[h]);
        store(out + 32 * h, x[h]);
      }
      const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
      const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
      const int32_t sum = _mm_cvtsi128_si32(two) + _mm_extract_epi32(two, 1);
      sums[s] = more ? sums[s] + sum : sum;
    }
  }

  static void store(K* p, I x) { _mm256_storeu_si256(reinterpret_cast<I*>(p), x); }

  // Four rows, 32 numbers of each at a time; the next group overwrites the bytes written past the last number.
  static void weave(const uint8_t* v, size_t step, size_t rows, size_t n, K* out) {
    for (size_t i = 0; i < n; i += 32) {
      I x[4];
      for (size_t r = 0; r < 4; ++r) x[r] = r < rows ? less(v + r * step + i, n - i) : _mm256_setzero_si256();
      const I a = _mm256_unpacklo_epi8(x[0], x[1]), b = _mm256_unpacklo_epi8(x[2], x[3]);
      const I c = _mm256_unpackhi_epi8(x[0], x[1]), d = _mm256_unpackhi_epi8(x[2], x[3]);
      const I y[4] = {_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b), _mm256_unpacklo_epi16(c, d),
                      _mm256_unpackhi_epi16(c, d)};  // four numbers of either half
      const I z[4] = {_mm256_permute2x128_si256(y[0], y[1], 0x20), _mm256_permute2x128_si256(y[2], y[3], 0x20),
                      _mm256_permute2x128_si256(y[0], y[1], 0x31), _mm256_permute2x128_si256(y[2], y[3], 0x31)};
      for (size_t j = 0; j < 4 && i + j * 8 < n; ++j) store(out + (i + j * 8) * 4, z[j]);
    }
  }

  static void panel(const uint8_t* q, size_t step, size_t rows, size_t dims, I* out) {
    I r[8];
    for (size_t i = 0; i < dims; i += 32) {
      const size_t count = words(q, step, rows, dims, i, r);
      for (size_t w = 0; w < count; ++w) out[i / 4 + w] = r[w];
    }
  }
};

#include "quant_attention_body.inc"
#include "quant_attention_few.inc"

}  // namespace

void quant_attention_avxvnni(const AttentionHead& head, void* scratch) { attend(head, scratch); }

}  // namespace calmclip
