#include <immintrin.h>

#include "soft_nms_race.h"

namespace calmclip {
namespace {

inline __mmask16 touch16(const Field& f, size_t at, __m512 x0, __m512 y0, __m512 x1, __m512 y1) {
  const __m512 left = _mm512_max_ps(x0, _mm512_load_ps(f.low_x + at));
  const __m512 top = _mm512_max_ps(y0, _mm512_load_ps(f.low_y + at));
  const __m512 right = _mm512_min_ps(x1, _mm512_load_ps(f.high_x + at));
  const __m512 bottom = _mm512_min_ps(y1, _mm512_load_ps(f.high_y + at));
  return _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(left, right, _CMP_LT_OQ), top, bottom, _CMP_LT_OQ);
}

inline uint64_t touching(const Field& f, size_t at, const Box& box) {
  const __m512 x0 = _mm512_set1_ps(box.x0), y0 = _mm512_set1_ps(box.y0);
  const __m512 x1 = _mm512_set1_ps(box.x1), y1 = _mm512_set1_ps(box.y1);
  const __mmask16 a = touch16(f, at, x0, y0, x1, y1), b = touch16(f, at + 16, x0, y0, x1, y1);
  const __mmask16 c = touch16(f, at + 32, x0, y0, x1, y1), d = touch16(f, at + 48, x0, y0, x1, y1);
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

inline __m512i mirror(__m512i x) {
  return _mm512_xor_si512(x, _mm512_and_si512(_mm512_srai_epi32(x, 31), _mm512_set1_epi32(INT32_MAX)));
}

inline uint32_t meet(const Field& f, size_t block, const Box& box, const Rule& rule) {
  const size_t at = block * kBlock;
  const __m512 one = _mm512_set1_ps(1.0f), zero = _mm512_setzero_ps();
  const __m512i none = _mm512_set1_epi32(kGone);
  const __m512i key = _mm512_load_si512(f.key + at);
  const __m512 left = _mm512_max_ps(_mm512_load_ps(f.x0 + at), _mm512_set1_ps(box.x0));
  const __m512 top = _mm512_max_ps(_mm512_load_ps(f.y0 + at), _mm512_set1_ps(box.y0));
  const __m512 right = _mm512_min_ps(_mm512_load_ps(f.x1 + at), _mm512_set1_ps(box.x1));
  const __m512 bottom = _mm512_min_ps(_mm512_load_ps(f.y1 + at), _mm512_set1_ps(box.y1));
  __mmask16 touch = _mm512_cmpneq_epi32_mask(key, none);
  touch = _mm512_mask_cmp_ps_mask(touch, left, right, _CMP_LT_OQ);
  touch = _mm512_mask_cmp_ps_mask(touch, top, bottom, _CMP_LT_OQ);
  if (!touch) return 0;
  const __m512 shared = _mm512_mul_ps(_mm512_sub_ps(right, left), _mm512_sub_ps(bottom, top));
  const __m512 both = _mm512_add_ps(_mm512_load_ps(f.area + at), _mm512_set1_ps(box.area));
  const __m512 iou = _mm512_maskz_div_ps(touch, shared, _mm512_sub_ps(both, shared));
  __m512 weight;
  if (rule.method > 1) {
    weight = power(_mm512_mul_ps(_mm512_mul_ps(iou, iou), _mm512_set1_ps(rule.steepness)));
  } else {
    const __mmask16 over = _mm512_cmp_ps_mask(iou, _mm512_set1_ps(rule.threshold), _CMP_GT_OQ);
    weight = _mm512_mask_mov_ps(one, over, rule.method == 0 ? zero : _mm512_sub_ps(one, iou));
  }
  const __m512 score = _mm512_mul_ps(_mm512_castsi512_ps(mirror(key)), weight);
  __mmask16 stay = _mm512_mask_cmp_ps_mask(touch, weight, zero, _CMP_GT_OQ);
  stay = _mm512_mask_cmp_ps_mask(stay, score, _mm512_set1_ps(rule.min_score), _CMP_GE_OQ);
  __m512i now = _mm512_mask_mov_epi32(key, touch, none);
  now = _mm512_mask_mov_epi32(now, stay, mirror(_mm512_castps_si512(_mm512_add_ps(score, zero))));
  _mm512_store_si512(f.key + at, now);
  f.top[block] = _mm512_reduce_max_epi32(now);
  return static_cast<uint32_t>(__builtin_popcount(static_cast<uint32_t>(touch & ~stay)));
}

inline int32_t greatest(const int32_t* keys, size_t n) {
  __m512i best = _mm512_load_si512(keys);
  for (size_t i = 16; i < n; i += 16) best = _mm512_max_epi32(best, _mm512_load_si512(keys + i));
  return _mm512_reduce_max_epi32(best);
}

// The whole vector is stored, so that the next load does not wait for a narrow store to retire.
inline int32_t drop(int32_t* keys, size_t lane) {
  const __m512i left =
      _mm512_mask_set1_epi32(_mm512_load_si512(keys), static_cast<__mmask16>(1u << lane), kGone);
  _mm512_store_si512(keys, left);
  return _mm512_reduce_max_epi32(left);
}

inline uint32_t equal(const int32_t* keys, int32_t key) {
  return _mm512_cmpeq_epi32_mask(_mm512_load_si512(keys), _mm512_set1_epi32(key));
}

}  // namespace

CALMCLIP_SOFT_NMS(avx512)

}  // namespace calmclip
