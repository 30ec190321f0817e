#include <immintrin.h>

#include "soft_nms_race.h"

namespace calmclip {
namespace {

inline __mmask16 touch16(const Picks& p, size_t at, __m512 x0, __m512 y0, __m512 x1, __m512 y1) {
  const __m512 left = _mm512_max_ps(x0, _mm512_load_ps(p.x0 + at)), top = _mm512_max_ps(y0, _mm512_load_ps(p.y0 + at));
  const __m512 right = _mm512_min_ps(x1, _mm512_load_ps(p.x1 + at)),
               bottom = _mm512_min_ps(y1, _mm512_load_ps(p.y1 + at));
  return _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(left, right, _CMP_LT_OQ), top, bottom, _CMP_LT_OQ);
}

inline uint64_t touching(const Picks& picks, size_t at, const Box& box) {
  const __m512 x0 = _mm512_set1_ps(box.x0), y0 = _mm512_set1_ps(box.y0);
  const __m512 x1 = _mm512_set1_ps(box.x1), y1 = _mm512_set1_ps(box.y1);
  const __mmask16 a = touch16(picks, at, x0, y0, x1, y1), b = touch16(picks, at + 16, x0, y0, x1, y1);
  const __mmask16 c = touch16(picks, at + 32, x0, y0, x1, y1), d = touch16(picks, at + 48, x0, y0, x1, y1);
  return _cvtmask64_u64(_mm512_kunpackd(_mm512_kunpackw(d, c), _mm512_kunpackw(b, a)));
}

inline __m512 power(__m512 t) {
  t = _mm512_max_ps(t, _mm512_set1_ps(kFloor));
  const __m512 rounded = _mm512_add_ps(_mm512_mul_ps(t, _mm512_set1_ps(kLog2E)), _mm512_set1_ps(kRound));
  const __m512 n = _mm512_sub_ps(rounded, _mm512_set1_ps(kRound));
  const __m512 r = _mm512_sub_ps(_mm512_sub_ps(t, _mm512_mul_ps(n, _mm512_set1_ps(kLn2High))),
                                 _mm512_mul_ps(n, _mm512_set1_ps(kLn2Low)));
  __m512 p = _mm512_set1_ps(kFirst);
  for (const float e : kRest) p = _mm512_add_ps(_mm512_mul_ps(p, r), _mm512_set1_ps(e));
  p = _mm512_add_ps(_mm512_add_ps(_mm512_mul_ps(p, _mm512_mul_ps(r, r)), r), _mm512_set1_ps(1.0f));
  const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(rounded), 23));
  const __m512 y = _mm512_castsi512_ps(bits);
  const __mmask16 normal = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(t, _mm512_set1_ps(kLowest), _CMP_GE_OQ), y,
                                                   _mm512_set1_ps(FLT_MIN), _CMP_GE_OQ);
  return _mm512_maskz_mov_ps(normal, y);
}

inline bool weigh(const Rule& rule, const float* shared, const float* whole, size_t n, float* weight) {
  const __m512 one = _mm512_set1_ps(1.0f), zero = _mm512_setzero_ps();
  __mmask16 gone = 0;
  for (size_t i = 0; i < n; i += 16) {
    const __m512 iou = _mm512_div_ps(_mm512_load_ps(shared + i), _mm512_load_ps(whole + i));
    __m512 w;
    if (rule.method > 1) {
      w = power(_mm512_mul_ps(_mm512_mul_ps(iou, iou), _mm512_set1_ps(rule.steepness)));
    } else {
      const __mmask16 over = _mm512_cmp_ps_mask(iou, _mm512_set1_ps(rule.threshold), _CMP_GT_OQ);
      w = _mm512_mask_mov_ps(one, over, rule.method == 0 ? zero : _mm512_sub_ps(one, iou));
    }
    gone |= _mm512_cmp_ps_mask(w, zero, _CMP_EQ_OQ);
    _mm512_store_ps(weight + i, w);
  }
  return gone != 0;
}

// Whole vectors are stored, so that the next load of them need not wait for a narrow store to retire.
inline int32_t put(int32_t* keys, size_t n, size_t at, int32_t key) {
  const size_t block = at & ~size_t{15};
  const __m512i changed = _mm512_mask_set1_epi32(_mm512_load_si512(keys + block),
                                                 static_cast<__mmask16>(1u << (at & 15)), key);
  _mm512_store_si512(keys + block, changed);
  __m512i top = changed;
  for (size_t i = 0; i < n; i += 16) top = _mm512_max_epi32(top, _mm512_load_si512(keys + i));
  return _mm512_reduce_max_epi32(top);
}

inline size_t first(const int32_t* keys, size_t, int32_t key) {
  const __m512i wanted = _mm512_set1_epi32(key);
  for (size_t i = 0;; i += 16) {
    const __mmask16 equal = _mm512_cmpeq_epi32_mask(_mm512_load_si512(keys + i), wanted);
    if (equal) return i + static_cast<size_t>(__builtin_ctz(equal));
  }
}

}  // namespace

CALMCLIP_SOFT_NMS(avx512)

}  // namespace calmclip
