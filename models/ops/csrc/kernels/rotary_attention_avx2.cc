#include "rotary_attention.h"

#include <immintrin.h>

namespace calmclip {

extern "C" RotaryAttention rotary_attention_avx2;

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace {

struct V {
  using F = __m256;
  static constexpr size_t kWidth = 8, kTile = 8;
  static F set(float v) { return _mm256_set1_ps(v); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F within(F x, F s, F a, F b) {
    const F shown = _mm256_and_ps(_mm256_cmp_ps(a, s, _CMP_LE_OQ), _mm256_cmp_ps(s, b, _CMP_LT_OQ));
    return _mm256_blendv_ps(set(kLowest), x, shown);
  }
  static F raise(F p, F n) {
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(n), 23)));
  }
};

#include "rotary_attention_body.inc"

}  // namespace

void rotary_attention_avx2(const AttentionGroup& group, float* scratch) { Group(group, scratch).rows(); }

}  // namespace calmclip
