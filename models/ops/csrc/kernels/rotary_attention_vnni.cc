#include "rotary_attention.h"

#include <immintrin.h>

namespace calmclip {

extern "C" RotaryAttention rotary_attention_vnni;

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace {

struct V {
  using F = __m512;
  static constexpr size_t kWidth = 16, kTile = 16;
  static F set(float v) { return _mm512_set1_ps(v); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F within(F x, F s, F a, F b) {
    const __mmask16 shown = _mm512_cmp_ps_mask(a, s, _CMP_LE_OQ) & _mm512_cmp_ps_mask(s, b, _CMP_LT_OQ);
    return _mm512_mask_mov_ps(set(kLowest), shown, x);
  }
  static F raise(F p, F n) {
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(n), 23)));
  }
};

#include "rotary_attention_body.inc"

}  // namespace

void rotary_attention_vnni(const AttentionGroup& group, float* scratch) { Group(group, scratch).rows(); }

}  // namespace calmclip
