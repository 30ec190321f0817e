#include "soft_nms_race.h"

namespace calmclip {
namespace {

uint64_t touching(const Picks& picks, size_t at, const Box& box) {
  uint64_t found = 0;
  for (size_t j = 0; j < 64; ++j) {
    const size_t p = at + j;
    const bool touch = (picks.x0[p] < box.x1) & (box.x0 < picks.x1[p]) & (picks.y0[p] < box.y1) & (box.y0 < picks.y1[p]);
    found |= static_cast<uint64_t>(touch) << j;
  }
  return found;
}

float power(float t) {
  t = t < kFloor ? kFloor : t;
  const float rounded = t * kLog2E + kRound;
  const float n = rounded - kRound;
  const float r = (t - n * kLn2High) - n * kLn2Low;
  float p = kFirst;
  for (const float e : kRest) p = p * r + e;
  p = (p * (r * r) + r) + 1.0f;
  uint32_t bits, shift;
  std::memcpy(&bits, &p, sizeof bits);
  std::memcpy(&shift, &rounded, sizeof shift);
  bits += shift << 23;  // the low bits of `rounded` are n
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return t < kLowest || y < FLT_MIN ? 0.0f : y;
}

bool weigh(const Rule& rule, const float* shared, const float* whole, size_t n, float* weight) {
  bool gone = false;
  for (size_t i = 0; i < n; ++i) {
    const float iou = shared[i] / whole[i];
    if (rule.method > 1)
      weight[i] = power(iou * iou * rule.steepness);
    else
      weight[i] = iou > rule.threshold ? rule.method == 0 ? 0.0f : 1.0f - iou : 1.0f;
    gone |= weight[i] == 0.0f;
  }
  return gone;
}

int32_t put(int32_t* keys, size_t n, size_t at, int32_t key) {
  keys[at] = key;
  int32_t top = keys[0];
  for (size_t i = 1; i < n; ++i) top = keys[i] > top ? keys[i] : top;
  return top;
}

size_t first(const int32_t* keys, size_t, int32_t key) {
  size_t i = 0;
  while (keys[i] != key) ++i;
  return i;
}

}  // namespace

CALMCLIP_SOFT_NMS(scalar)

}  // namespace calmclip
