#include "quant_lookup.h"

#include <immintrin.h>

#include <type_traits>

namespace calmclip {
namespace {

template <size_t n>
using Count = std::integral_constant<size_t, n>;

}  // namespace

extern "C" QuantLookup quant_lookup_avx2;

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

// The lower four bits pick a candidate from each sixteenth of the table. The upper four bits then halve the candidates
// four times. It takes a quarter of the time of one byte after the other; sixteen comparisons instead of the halving
// take .36.
void quant_lookup_avx2(const uint8_t* x, uint8_t* y, size_t count, const uint8_t* table) {
  size_t i = 0;
  for (; i + 32 <= count; i += 32) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    const __m256i low = _mm256_and_si256(v, _mm256_set1_epi8(15));
    __m256i picked[16];
    UNROLL for (size_t j = 0; j < 16; ++j) {
      const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table) + j);
      picked[j] = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(part), low);
    }
    const auto halve = [&](auto pairs, __m256i bits) {
      constexpr size_t end = decltype(pairs)::value;
      UNROLL for (size_t j = 0; j < end; ++j) picked[j] = _mm256_blendv_epi8(picked[2 * j], picked[2 * j + 1], bits);
    };
    halve(Count<8>{}, _mm256_slli_epi16(v, 3));
    halve(Count<4>{}, _mm256_slli_epi16(v, 2));
    halve(Count<2>{}, _mm256_slli_epi16(v, 1));
    halve(Count<1>{}, v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i), picked[0]);
  }
  for (; i < count; ++i) y[i] = table[x[i]];
}

}  // namespace calmclip
