#include "quant_add.h"

#include <immintrin.h>

namespace calmclip {

extern "C" QuantAdd quant_add_vnni;

namespace {

// Bytes are masked out of words and keep their position, so they are multiplied by 2^8 or 2^16. Masks run on every
// execution unit, shuffles do not. The factors divide by the same power. The constants of a block stay in registers for
// all rows.
template <bool whole>
void add(const AddBlock block) {
  __m512 a_factor[4], b_factor[4], start[4];
  __m512i zero[4];
  constexpr float unit[4] = {1, 0x1p-8f, 0x1p-16f, 1};
  for (size_t i = 0; i < 4; ++i) {
    a_factor[i] = _mm512_mul_ps(_mm512_loadu_ps(block.a_factor + 16 * i), _mm512_set1_ps(unit[i]));
    b_factor[i] = _mm512_mul_ps(_mm512_loadu_ps(block.b_factor + 16 * i), _mm512_set1_ps(unit[i]));
    start[i] = _mm512_loadu_ps(block.start + 16 * i);
    zero[i] = _mm512_loadu_si512(block.zero + 16 * i);
  }
  // restores the order of the bytes within each word
  const __m512i even = _mm512_packs_epi32(zero[0], zero[2]), odd = _mm512_packs_epi32(zero[1], zero[3]);
  const __m512i order =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15));
  const __mmask64 there = ~__mmask64{0} >> (kAddBlock - block.width);
  for (size_t row = 0, at = 0; row < block.rows; ++row, at += block.step) {
    const auto load = [&](const uint8_t* p) {
      return whole ? _mm512_loadu_si512(p + at) : _mm512_maskz_loadu_epi8(there, p + at);
    };
    const __m512i a = load(block.a), b = load(block.b);
    const auto sum = [&](size_t i, __m512i a_words, __m512i b_words) {
      const __m512 b_part = _mm512_fmadd_ps(_mm512_cvtepi32_ps(b_words), b_factor[i], start[i]);
      return _mm512_cvtps_epi32(_mm512_fmadd_ps(_mm512_cvtepi32_ps(a_words), a_factor[i], b_part));
    };
    const auto masked = [&](size_t i) {
      const __m512i mask = _mm512_set1_epi32(0xff << 8 * i);
      return sum(i, _mm512_and_si512(a, mask), _mm512_and_si512(b, mask));
    };
    const __m512i last = sum(3, _mm512_srli_epi32(a, 24), _mm512_srli_epi32(b, 24));
    const __m512i words = _mm512_adds_epi16(_mm512_packs_epi32(masked(0), masked(2)), even);
    const __m512i more = _mm512_adds_epi16(_mm512_packs_epi32(masked(1), last), odd);
    const __m512i y = _mm512_shuffle_epi8(_mm512_packus_epi16(words, more), order);
    whole ? _mm512_storeu_si512(block.y + at, y) : _mm512_mask_storeu_epi8(block.y + at, there, y);
  }
}

}  // namespace

void quant_add_vnni(const AddBlock& block) { block.width == kAddBlock ? add<true>(block) : add<false>(block); }

}  // namespace calmclip
