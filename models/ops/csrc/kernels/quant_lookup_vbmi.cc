#include "quant_lookup.h"

#include <immintrin.h>

namespace calmclip {

extern "C" QuantLookup quant_lookup_vbmi;

// The table is in four registers; one instruction looks up the lower seven bits in two of them.
void quant_lookup_vbmi(const uint8_t* x, uint8_t* y, size_t count, const uint8_t* table) {
  const __m512i a = _mm512_loadu_si512(table), b = _mm512_loadu_si512(table + 64);
  const __m512i c = _mm512_loadu_si512(table + 128), d = _mm512_loadu_si512(table + 192);
  const auto look = [&](__m512i v) {
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(v), _mm512_permutex2var_epi8(a, v, b),
                                  _mm512_permutex2var_epi8(c, v, d));
  };
  size_t i = 0;
  for (; i + 64 <= count; i += 64) _mm512_storeu_si512(y + i, look(_mm512_loadu_si512(x + i)));
  const __mmask64 rest = (__mmask64{1} << (count - i)) - 1;
  _mm512_mask_storeu_epi8(y + i, rest, look(_mm512_maskz_loadu_epi8(rest, x + i)));
}

}  // namespace calmclip
