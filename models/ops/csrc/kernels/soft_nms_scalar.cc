#include "soft_nms_race.h"

namespace calmclip {
namespace {

inline uint64_t touching(const Field& f, size_t at, const Box& box) {
  uint64_t mask_bits = 0;
  for (size_t j = 0; j < 64; ++j) {
    const size_t b = at + j;
    const bool touch = (f.low_x[b] < box.x1) & (box.x0 < f.high_x[b]) & (f.low_y[b] < box.y1) & (box.y0 < f.high_y[b]);
    mask_bits |= static_cast<uint64_t>(touch) << j;
  }
  return mask_bits;
}

inline float power(float t) {
  t = t < kFloor ? kFloor : t;
  const float rounded = t * kLog2E + kRound;
  const float n = rounded - kRound;
  const float r = (t - n * kLn2High) - n * kLn2Low;
  float p = kFirst;
  for (const float e : kRest) p = p * r + e;
  p = (p * (r * r) + r) + 1.0f;
  uint32_t bits, shift;
  __builtin_memcpy(&bits, &p, sizeof bits);
  __builtin_memcpy(&shift, &rounded, sizeof shift);
  bits += shift << 23;  // the low bits of `rounded` are n
  float y;
  __builtin_memcpy(&y, &bits, sizeof y);
  return t < kLowest || y < FLT_MIN ? 0.0f : y;
}

inline uint32_t meet(const Field& f, size_t block, const Box& box, const Rule& rule) {
  uint32_t gone = 0;
  int32_t best = kGone;
  for (size_t i = block * kBlock; i < (block + 1) * kBlock; ++i) {
    if (f.key[i] == kGone) continue;
    const float left = f.x0[i] > box.x0 ? f.x0[i] : box.x0, top = f.y0[i] > box.y0 ? f.y0[i] : box.y0;
    const float right = f.x1[i] < box.x1 ? f.x1[i] : box.x1, bottom = f.y1[i] < box.y1 ? f.y1[i] : box.y1;
    if (left < right && top < bottom) {
      const float shared = (right - left) * (bottom - top);
      const float iou = shared / ((f.area[i] + box.area) - shared);
      float weight = 1.0f;
      if (rule.method > 1)
        weight = power(iou * iou * rule.steepness);
      else if (iou > rule.threshold)
        weight = rule.method == 0 ? 0.0f : 1.0f - iou;
      const float score = score_of(f.key[i]) * weight;
      const bool stays = weight > 0 && score >= rule.min_score;
      f.key[i] = stays ? key_of(score) : kGone;
      gone += !stays;
    }
    best = f.key[i] > best ? f.key[i] : best;
  }
  f.top[block] = best;
  return gone;
}

inline int32_t greatest(const int32_t* keys, size_t n) {
  int32_t best = keys[0];
  for (size_t i = 1; i < n; ++i) best = keys[i] > best ? keys[i] : best;
  return best;
}

inline int32_t drop(int32_t* keys, size_t lane) {
  keys[lane] = kGone;
  return greatest(keys, kBlock);
}

inline uint32_t equal(const int32_t* keys, int32_t key) {
  uint32_t mask_bits = 0;
  for (size_t j = 0; j < kBlock; ++j) mask_bits |= static_cast<uint32_t>(keys[j] == key) << j;
  return mask_bits;
}

}  // namespace

CALMCLIP_SOFT_NMS(scalar)

}  // namespace calmclip
