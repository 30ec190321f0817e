#include "quant_add.h"

#include <immintrin.h>

namespace calmclip {

extern "C" QuantAdd quant_add_vnni;

namespace {

__m512 floats(const uint8_t* p, __mmask16 there) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, p)));
}

__m512 floats(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

// The numbers of a block lie in registers, row after row.
template <bool whole>
void add(const AddBlock block) {
  __m512 a_factor[4], b_factor[4], start[4];
  __m512i zero[4];
  for (size_t i = 0; i < 4; ++i) {
    a_factor[i] = _mm512_loadu_ps(block.a_factor + 16 * i);
    b_factor[i] = _mm512_loadu_ps(block.b_factor + 16 * i);
    start[i] = _mm512_loadu_ps(block.start + 16 * i);
    zero[i] = _mm512_loadu_si512(block.zero + 16 * i);
  }
  const __m512i low = _mm512_packs_epi32(zero[0], zero[1]), high = _mm512_packs_epi32(zero[2], zero[3]);
  // packing takes four numbers of each vector in turn
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __mmask64 there = ~__mmask64{0} >> (kAddBlock - block.width);
  for (size_t row = 0, at = 0; row < block.rows; ++row, at += block.step) {
    const uint8_t *const a = block.a + at, *const b = block.b + at;
    __m512i sum[4];
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; ++i) {
      const auto part = static_cast<__mmask16>(there >> (16 * i));
      const __m512 one = whole ? floats(a + 16 * i) : floats(a + 16 * i, part);
      const __m512 other = whole ? floats(b + 16 * i) : floats(b + 16 * i, part);
      sum[i] = _mm512_cvtps_epi32(_mm512_fmadd_ps(one, a_factor[i], _mm512_fmadd_ps(other, b_factor[i], start[i])));
    }
    const __m512i words = _mm512_adds_epi16(_mm512_packs_epi32(sum[0], sum[1]), low);
    const __m512i more = _mm512_adds_epi16(_mm512_packs_epi32(sum[2], sum[3]), high);
    const __m512i y = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(words, more));
    whole ? _mm512_storeu_si512(block.y + at, y) : _mm512_mask_storeu_epi8(block.y + at, there, y);
  }
}

}  // namespace

void quant_add_vnni(const AddBlock& block) { block.width == kAddBlock ? add<true>(block) : add<false>(block); }

}  // namespace calmclip
