#include "quant_add.h"

#include <immintrin.h>

#include <cstring>

namespace calmclip {

extern "C" QuantAdd quant_add_avx2;

namespace {

constexpr size_t kFourth = kAddBlock / 4;

// The constants of a block, scaled by 2^8 or 2^16 for bytes that keep their position within a word.
struct Numbers {
  alignas(32) float a_factor[kAddBlock], b_factor[kAddBlock], start[kAddBlock];
  alignas(32) int16_t zero[kAddBlock];  // in the order in which `add` packs words

  explicit Numbers(const AddBlock& block) {
    std::memcpy(start, block.start, sizeof start);
    for (size_t i = 0; i < kAddBlock; ++i) {
      const size_t place = i / kFourth;
      const float unit = place == 1 ? 0x1p-8f : place == 2 ? 0x1p-16f : 1;
      a_factor[i] = block.a_factor[i] * unit;
      b_factor[i] = block.b_factor[i] * unit;
    }
    for (size_t half = 0; half < 2; ++half)
      for (size_t place = 0; place < 2; ++place) {
        const auto load = [&](size_t at) {
          return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block.zero + at * kFourth + 8 * half));
        };
        const __m256i words = _mm256_packs_epi32(load(place), load(place + 2));
        _mm256_store_si256(reinterpret_cast<__m256i*>(zero + 32 * half + 16 * place), words);
      }
  }
};

// Adds half a block: 32 bytes.
void add(const Numbers& of, size_t half, const uint8_t* a, const uint8_t* b, uint8_t* y) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + 32 * half));
  const __m256i z = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + 32 * half));
  const auto sum = [&](size_t i, __m256i a_words, __m256i b_words) {
    const size_t at = i * kFourth + 8 * half;
    const __m256 b_part =
        _mm256_fmadd_ps(_mm256_cvtepi32_ps(b_words), _mm256_load_ps(of.b_factor + at), _mm256_load_ps(of.start + at));
    return _mm256_cvtps_epi32(_mm256_fmadd_ps(_mm256_cvtepi32_ps(a_words), _mm256_load_ps(of.a_factor + at), b_part));
  };
  const auto masked = [&](size_t i) {
    const __m256i mask = _mm256_set1_epi32(0xff << 8 * i);
    return sum(i, _mm256_and_si256(x, mask), _mm256_and_si256(z, mask));
  };
  const auto zero = [&](size_t i) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(of.zero + 32 * half + 16 * i));
  };
  const __m256i last = sum(3, _mm256_srli_epi32(x, 24), _mm256_srli_epi32(z, 24));
  const __m256i even = _mm256_adds_epi16(_mm256_packs_epi32(masked(0), masked(2)), zero(0));
  const __m256i odd = _mm256_adds_epi16(_mm256_packs_epi32(masked(1), last), zero(1));
  // restores the order of the bytes within each word
  const __m256i order =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15));
  const __m256i bytes = _mm256_shuffle_epi8(_mm256_packus_epi16(even, odd), order);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + 32 * half), bytes);
}

}  // namespace

void quant_add_avx2(const AddBlock& block) {
  const Numbers numbers(block);
  const auto both = [&](const uint8_t* a, const uint8_t* b, uint8_t* y) {
    add(numbers, 0, a, b, y);
    add(numbers, 1, a, b, y);
  };
  for (size_t row = 0, at = 0; row < block.rows; ++row, at += block.step) {
    if (block.width == kAddBlock) {
      both(block.a + at, block.b + at, block.y + at);
      continue;
    }
    uint8_t a[kAddBlock] = {}, b[kAddBlock] = {};
    std::memcpy(a, block.a + at, block.width);
    std::memcpy(b, block.b + at, block.width);
    both(a, b, a);
    std::memcpy(block.y + at, a, block.width);
  }
}

}  // namespace calmclip
