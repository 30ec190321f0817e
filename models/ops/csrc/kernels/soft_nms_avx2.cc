#include <immintrin.h>

#include "soft_nms_race.h"

namespace calmclip {
namespace {

inline uint64_t touching(const Picks& picks, size_t at, const Box& box) {
  const __m256 x0 = _mm256_set1_ps(box.x0), y0 = _mm256_set1_ps(box.y0);
  const __m256 x1 = _mm256_set1_ps(box.x1), y1 = _mm256_set1_ps(box.y1);
  uint64_t found = 0;
  for (size_t j = 0; j < 64; j += 8) {
    const size_t p = at + j;
    const __m256 left = _mm256_max_ps(x0, _mm256_load_ps(picks.x0 + p));
    const __m256 top = _mm256_max_ps(y0, _mm256_load_ps(picks.y0 + p));
    const __m256 right = _mm256_min_ps(x1, _mm256_load_ps(picks.x1 + p));
    const __m256 bottom = _mm256_min_ps(y1, _mm256_load_ps(picks.y1 + p));
    const __m256 touch = _mm256_and_ps(_mm256_cmp_ps(left, right, _CMP_LT_OQ), _mm256_cmp_ps(top, bottom, _CMP_LT_OQ));
    found |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_ps(touch))) << j;
  }
  return found;
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

inline bool weigh(const Rule& rule, const float* shared, const float* whole, size_t n, float* weight) {
  const __m256 one = _mm256_set1_ps(1.0f), zero = _mm256_setzero_ps();
  int gone = 0;
  for (size_t i = 0; i < n; i += 8) {
    const __m256 iou = _mm256_div_ps(_mm256_load_ps(shared + i), _mm256_load_ps(whole + i));
    __m256 w;
    if (rule.method > 1) {
      w = power(_mm256_mul_ps(_mm256_mul_ps(iou, iou), _mm256_set1_ps(rule.steepness)));
    } else {
      const __m256 over = _mm256_cmp_ps(iou, _mm256_set1_ps(rule.threshold), _CMP_GT_OQ);
      w = _mm256_blendv_ps(one, rule.method == 0 ? zero : _mm256_sub_ps(one, iou), over);
    }
    gone |= _mm256_movemask_ps(_mm256_cmp_ps(w, zero, _CMP_EQ_OQ));
    _mm256_store_ps(weight + i, w);
  }
  return gone != 0;
}

inline __m256i load(const int32_t* keys) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(keys)); }

// Whole vectors are stored, so that the next load of them need not wait for a narrow store to retire.
inline int32_t put(int32_t* keys, size_t n, size_t at, int32_t key) {
  const size_t block = at & ~size_t{7};
  const __m256i lane = _mm256_cmpeq_epi32(_mm256_set1_epi32(static_cast<int32_t>(at & 7)),
                                          _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  const __m256i changed = _mm256_blendv_epi8(load(keys + block), _mm256_set1_epi32(key), lane);
  _mm256_store_si256(reinterpret_cast<__m256i*>(keys + block), changed);
  __m256i top = changed;
  for (size_t i = 0; i < n; i += 8) top = _mm256_max_epi32(top, load(keys + i));
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xB1));
  return _mm_cvtsi128_si32(four);
}

inline size_t first(const int32_t* keys, size_t, int32_t key) {
  const __m256i wanted = _mm256_set1_epi32(key);
  for (size_t i = 0;; i += 8) {
    const int equal = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(load(keys + i), wanted)));
    if (equal) return i + static_cast<size_t>(__builtin_ctz(static_cast<uint32_t>(equal)));
  }
}

}  // namespace

CALMCLIP_SOFT_NMS(avx2)

}  // namespace calmclip
