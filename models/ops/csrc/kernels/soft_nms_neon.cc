#include <arm_neon.h>

#include "soft_nms_race.h"

namespace calmclip {
namespace {

inline uint64_t touching(const Picks& picks, size_t at, const Box& box) {
  const float32x4_t x0 = vdupq_n_f32(box.x0), y0 = vdupq_n_f32(box.y0);
  const float32x4_t x1 = vdupq_n_f32(box.x1), y1 = vdupq_n_f32(box.y1);
  const uint32_t places[4] = {1, 2, 4, 8};
  const uint32x4_t place = vld1q_u32(places);
  uint64_t found = 0;
  for (size_t j = 0; j < 64; j += 4) {
    const size_t p = at + j;
    const uint32x4_t across = vandq_u32(vcltq_f32(vld1q_f32(picks.x0 + p), x1), vcltq_f32(x0, vld1q_f32(picks.x1 + p)));
    const uint32x4_t down = vandq_u32(vcltq_f32(vld1q_f32(picks.y0 + p), y1), vcltq_f32(y0, vld1q_f32(picks.y1 + p)));
    found |= static_cast<uint64_t>(vaddvq_u32(vandq_u32(vandq_u32(across, down), place))) << j;
  }
  return found;
}

inline float32x4_t power(float32x4_t t) {
  t = vmaxq_f32(t, vdupq_n_f32(kFloor));
  const float32x4_t rounded = vaddq_f32(vmulq_f32(t, vdupq_n_f32(kLog2E)), vdupq_n_f32(kRound));
  const float32x4_t n = vsubq_f32(rounded, vdupq_n_f32(kRound));
  const float32x4_t r =
      vsubq_f32(vsubq_f32(t, vmulq_f32(n, vdupq_n_f32(kLn2High))), vmulq_f32(n, vdupq_n_f32(kLn2Low)));
  float32x4_t p = vdupq_n_f32(kFirst);
  for (const float e : kRest) p = vaddq_f32(vmulq_f32(p, r), vdupq_n_f32(e));
  p = vaddq_f32(vaddq_f32(vmulq_f32(p, vmulq_f32(r, r)), r), vdupq_n_f32(1.0f));
  const uint32x4_t bits = vaddq_u32(vreinterpretq_u32_f32(p), vshlq_n_u32(vreinterpretq_u32_f32(rounded), 23));
  const uint32x4_t normal = vandq_u32(vcgeq_f32(t, vdupq_n_f32(kLowest)),
                                      vcgeq_f32(vreinterpretq_f32_u32(bits), vdupq_n_f32(FLT_MIN)));
  return vreinterpretq_f32_u32(vandq_u32(normal, bits));
}

inline bool weigh(const Rule& rule, const float* shared, const float* whole, size_t n, float* weight) {
  const float32x4_t one = vdupq_n_f32(1.0f), zero = vdupq_n_f32(0.0f);
  uint32x4_t gone = vdupq_n_u32(0);
  for (size_t i = 0; i < n; i += 4) {
    const float32x4_t iou = vdivq_f32(vld1q_f32(shared + i), vld1q_f32(whole + i));
    float32x4_t w;
    if (rule.method > 1) {
      w = power(vmulq_f32(vmulq_f32(iou, iou), vdupq_n_f32(rule.steepness)));
    } else {
      const uint32x4_t over = vcgtq_f32(iou, vdupq_n_f32(rule.threshold));
      w = vbslq_f32(over, rule.method == 0 ? zero : vsubq_f32(one, iou), one);
    }
    gone = vorrq_u32(gone, vceqq_f32(w, zero));
    vst1q_f32(weight + i, w);
  }
  return vmaxvq_u32(gone) != 0;
}

inline int32_t put(int32_t* keys, size_t n, size_t at, int32_t key) {
  keys[at] = key;
  int32x4_t top = vdupq_n_s32(kGone);
  for (size_t i = 0; i < n; i += 4) top = vmaxq_s32(top, vld1q_s32(keys + i));
  return vmaxvq_s32(top);
}

inline size_t first(const int32_t* keys, size_t, int32_t key) {
  size_t i = 0;
  const int32x4_t wanted = vdupq_n_s32(key);
  while (vmaxvq_u32(vceqq_s32(vld1q_s32(keys + i), wanted)) == 0) i += 4;
  while (keys[i] != key) ++i;
  return i;
}

}  // namespace

CALMCLIP_SOFT_NMS(neon)

}  // namespace calmclip
