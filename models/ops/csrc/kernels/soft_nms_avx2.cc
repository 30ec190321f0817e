#include <immintrin.h>

#include "soft_nms_race.h"

namespace calmclip {
namespace {

inline uint64_t touching(const Field& f, size_t at, const Box& box) {
  const __m256 x0 = _mm256_set1_ps(box.x0), y0 = _mm256_set1_ps(box.y0);
  const __m256 x1 = _mm256_set1_ps(box.x1), y1 = _mm256_set1_ps(box.y1);
  uint64_t mask_bits = 0;
  for (size_t j = 0; j < 64; j += 8) {
    const size_t b = at + j;
    const __m256 left = _mm256_max_ps(x0, _mm256_load_ps(f.low_x + b));
    const __m256 top = _mm256_max_ps(y0, _mm256_load_ps(f.low_y + b));
    const __m256 right = _mm256_min_ps(x1, _mm256_load_ps(f.high_x + b));
    const __m256 bottom = _mm256_min_ps(y1, _mm256_load_ps(f.high_y + b));
    const __m256 touch = _mm256_and_ps(_mm256_cmp_ps(left, right, _CMP_LT_OQ), _mm256_cmp_ps(top, bottom, _CMP_LT_OQ));
    mask_bits |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_ps(touch))) << j;
  }
  return mask_bits;
}

inline __m256 power(__m256 t) {
  t = _mm256_max_ps(t, _mm256_set1_ps(kFloor));
  const __m256 rounded = _mm256_add_ps(_mm256_mul_ps(t, _mm256_set1_ps(kLog2E)), _mm256_set1_ps(kRound));
  const __m256 n = _mm256_sub_ps(rounded, _mm256_set1_ps(kRound));
  const __m256 r = _mm256_sub_ps(_mm256_sub_ps(t, _mm256_mul_ps(n, _mm256_set1_ps(kLn2High))),
                                 _mm256_mul_ps(n, _mm256_set1_ps(kLn2Low)));
  __m256 p = _mm256_set1_ps(kFirst);
  for (const float e : kRest) p = _mm256_add_ps(_mm256_mul_ps(p, r), _mm256_set1_ps(e));
  p = _mm256_add_ps(_mm256_add_ps(_mm256_mul_ps(p, _mm256_mul_ps(r, r)), r), _mm256_set1_ps(1.0f));
  const __m256i bits = _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(rounded), 23));
  const __m256 y = _mm256_castsi256_ps(bits);
  const __m256 normal = _mm256_and_ps(_mm256_cmp_ps(t, _mm256_set1_ps(kLowest), _CMP_GE_OQ),
                                      _mm256_cmp_ps(y, _mm256_set1_ps(FLT_MIN), _CMP_GE_OQ));
  return _mm256_and_ps(normal, y);
}

inline __m256i load(const int32_t* keys) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(keys)); }
inline void store(int32_t* keys, __m256i x) { _mm256_store_si256(reinterpret_cast<__m256i*>(keys), x); }

inline int32_t reduce(__m256i x) {
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xB1));
  return _mm_cvtsi128_si32(four);
}

inline __m256i mirror(__m256i x) {
  return _mm256_xor_si256(x, _mm256_and_si256(_mm256_srai_epi32(x, 31), _mm256_set1_epi32(INT32_MAX)));
}

inline uint32_t meet(const Field& f, size_t block, const Box& box, const Rule& rule) {
  const __m256 one = _mm256_set1_ps(1.0f), zero = _mm256_setzero_ps();
  const __m256i none = _mm256_set1_epi32(kGone);
  __m256i best = none;
  uint32_t gone = 0;
  for (size_t at = block * kBlock; at < (block + 1) * kBlock; at += 8) {
    const __m256i key = load(f.key + at);
    const __m256 left = _mm256_max_ps(_mm256_load_ps(f.x0 + at), _mm256_set1_ps(box.x0));
    const __m256 top = _mm256_max_ps(_mm256_load_ps(f.y0 + at), _mm256_set1_ps(box.y0));
    const __m256 right = _mm256_min_ps(_mm256_load_ps(f.x1 + at), _mm256_set1_ps(box.x1));
    const __m256 bottom = _mm256_min_ps(_mm256_load_ps(f.y1 + at), _mm256_set1_ps(box.y1));
    const __m256 out = _mm256_castsi256_ps(_mm256_cmpeq_epi32(key, none));
    const __m256 meets = _mm256_and_ps(_mm256_cmp_ps(left, right, _CMP_LT_OQ), _mm256_cmp_ps(top, bottom, _CMP_LT_OQ));
    const __m256 touch = _mm256_andnot_ps(out, meets);
    if (!_mm256_movemask_ps(touch)) {
      best = _mm256_max_epi32(best, key);
      continue;
    }
    // a lane that does not touch divides 0 by 1
    const __m256 shared = _mm256_and_ps(touch, _mm256_mul_ps(_mm256_sub_ps(right, left), _mm256_sub_ps(bottom, top)));
    const __m256 both = _mm256_add_ps(_mm256_load_ps(f.area + at), _mm256_set1_ps(box.area));
    const __m256 iou = _mm256_div_ps(shared, _mm256_blendv_ps(one, _mm256_sub_ps(both, shared), touch));
    __m256 weight;
    if (rule.method > 1) {
      weight = power(_mm256_mul_ps(_mm256_mul_ps(iou, iou), _mm256_set1_ps(rule.steepness)));
    } else {
      const __m256 over = _mm256_cmp_ps(iou, _mm256_set1_ps(rule.threshold), _CMP_GT_OQ);
      weight = _mm256_blendv_ps(one, rule.method == 0 ? zero : _mm256_sub_ps(one, iou), over);
    }
    const __m256 score = _mm256_mul_ps(_mm256_castsi256_ps(mirror(key)), weight);
    const __m256 fair = _mm256_and_ps(_mm256_cmp_ps(weight, zero, _CMP_GT_OQ),
                                      _mm256_cmp_ps(score, _mm256_set1_ps(rule.min_score), _CMP_GE_OQ));
    const __m256i decayed = mirror(_mm256_castps_si256(_mm256_add_ps(score, zero)));
    const __m256i after = _mm256_blendv_epi8(none, decayed, _mm256_castps_si256(fair));
    const __m256i now = _mm256_blendv_epi8(key, after, _mm256_castps_si256(touch));
    store(f.key + at, now);
    best = _mm256_max_epi32(best, now);
    gone += static_cast<uint32_t>(
        __builtin_popcount(static_cast<uint32_t>(_mm256_movemask_ps(_mm256_andnot_ps(fair, touch)))));
  }
  f.top[block] = reduce(best);
  return gone;
}

inline int32_t greatest(const int32_t* keys, size_t n) {
  __m256i best = load(keys);
  for (size_t i = 8; i < n; i += 8) best = _mm256_max_epi32(best, load(keys + i));
  return reduce(best);
}

// Whole vectors are stored, so that the next load does not wait for a narrow store to retire.
inline int32_t drop(int32_t* keys, size_t lane) {
  int32_t* half = keys + (lane & 8);
  const __m256i hit = _mm256_cmpeq_epi32(_mm256_set1_epi32(static_cast<int32_t>(lane & 7)),
                                         _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  store(half, _mm256_blendv_epi8(load(half), _mm256_set1_epi32(kGone), hit));
  return greatest(keys, kBlock);
}

inline uint32_t equal(const int32_t* keys, int32_t key) {
  const __m256i wanted = _mm256_set1_epi32(key);
  const int low = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(load(keys), wanted)));
  const int high = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(load(keys + 8), wanted)));
  return static_cast<uint32_t>(low | high << 8);
}

}  // namespace

CALMCLIP_SOFT_NMS(avx2)

}  // namespace calmclip
