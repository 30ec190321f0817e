#include "quant_add.h"

#include <immintrin.h>

#include <cstring>

namespace calmclip {

extern "C" QuantAdd quant_add_avx2;

namespace {

__m256 floats(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

// One row: kAddBlock bytes of each.
void add(const AddBlock& block, const uint8_t* a, const uint8_t* b, uint8_t* y) {
  // packing takes four numbers of each vector in turn
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (size_t i = 0; i < kAddBlock; i += 32) {
    __m256i sum[4];
#pragma GCC unroll 4
    for (size_t j = 0; j < 4; ++j) {
      const size_t at = i + 8 * j;
      const __m256 other =
          _mm256_fmadd_ps(floats(b + at), _mm256_loadu_ps(block.b_factor + at), _mm256_loadu_ps(block.start + at));
      sum[j] = _mm256_cvtps_epi32(_mm256_fmadd_ps(floats(a + at), _mm256_loadu_ps(block.a_factor + at), other));
    }
    const auto zero = [&](size_t j) {
      const __m256i* const p = reinterpret_cast<const __m256i*>(block.zero + i + 8 * j);
      return _mm256_packs_epi32(_mm256_loadu_si256(p), _mm256_loadu_si256(p + 1));
    };
    const __m256i words = _mm256_adds_epi16(_mm256_packs_epi32(sum[0], sum[1]), zero(0));
    const __m256i more = _mm256_adds_epi16(_mm256_packs_epi32(sum[2], sum[3]), zero(2));
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words, more), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i), bytes);
  }
}

}  // namespace

void quant_add_avx2(const AddBlock& block) {
  for (size_t row = 0, at = 0; row < block.rows; ++row, at += block.step) {
    if (block.width == kAddBlock) {
      add(block, block.a + at, block.b + at, block.y + at);
      continue;
    }
    uint8_t a[kAddBlock] = {}, b[kAddBlock] = {};
    std::memcpy(a, block.a + at, block.width);
    std::memcpy(b, block.b + at, block.width);
    add(block, a, b, a);
    std::memcpy(block.y + at, a, block.width);
  }
}

}  // namespace calmclip
