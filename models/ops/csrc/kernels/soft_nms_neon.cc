#include <arm_neon.h>

#include "soft_nms_race.h"

namespace calmclip {
namespace {

// Bit j: lane j of `mask` is set.
inline uint32_t lanes(uint32x4_t mask) {
  const uint32_t places[4] = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(mask, vld1q_u32(places)));
}

inline uint64_t touching(const Field& f, size_t at, const Box& box) {
  const float32x4_t x0 = vdupq_n_f32(box.x0), y0 = vdupq_n_f32(box.y0);
  const float32x4_t x1 = vdupq_n_f32(box.x1), y1 = vdupq_n_f32(box.y1);
  uint64_t mask_bits = 0;
  for (size_t j = 0; j < 64; j += 4) {
    const size_t b = at + j;
    const uint32x4_t across = vandq_u32(vcltq_f32(vld1q_f32(f.low_x + b), x1), vcltq_f32(x0, vld1q_f32(f.high_x + b)));
    const uint32x4_t down = vandq_u32(vcltq_f32(vld1q_f32(f.low_y + b), y1), vcltq_f32(y0, vld1q_f32(f.high_y + b)));
    mask_bits |= static_cast<uint64_t>(lanes(vandq_u32(across, down))) << j;
  }
  return mask_bits;
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

inline int32x4_t mirror(int32x4_t x) {
  return veorq_s32(x, vandq_s32(vshrq_n_s32(x, 31), vdupq_n_s32(INT32_MAX)));
}

inline uint32_t meet(const Field& f, size_t block, const Box& box, const Rule& rule) {
  const float32x4_t one = vdupq_n_f32(1.0f), zero = vdupq_n_f32(0.0f);
  const int32x4_t none = vdupq_n_s32(kGone);
  int32x4_t best = none;
  uint32_t gone = 0;
  for (size_t at = block * kBlock; at < (block + 1) * kBlock; at += 4) {
    const int32x4_t key = vld1q_s32(f.key + at);
    const float32x4_t left = vmaxq_f32(vld1q_f32(f.x0 + at), vdupq_n_f32(box.x0));
    const float32x4_t top = vmaxq_f32(vld1q_f32(f.y0 + at), vdupq_n_f32(box.y0));
    const float32x4_t right = vminq_f32(vld1q_f32(f.x1 + at), vdupq_n_f32(box.x1));
    const float32x4_t bottom = vminq_f32(vld1q_f32(f.y1 + at), vdupq_n_f32(box.y1));
    const uint32x4_t meets = vandq_u32(vcltq_f32(left, right), vcltq_f32(top, bottom));
    const uint32x4_t touch = vbicq_u32(meets, vceqq_s32(key, none));
    if (vmaxvq_u32(touch) == 0) {
      best = vmaxq_s32(best, key);
      continue;
    }
    // a lane that does not touch divides 0 by 1
    const float32x4_t shared = vbslq_f32(touch, vmulq_f32(vsubq_f32(right, left), vsubq_f32(bottom, top)), zero);
    const float32x4_t both = vaddq_f32(vld1q_f32(f.area + at), vdupq_n_f32(box.area));
    const float32x4_t iou = vdivq_f32(shared, vbslq_f32(touch, vsubq_f32(both, shared), one));
    float32x4_t weight;
    if (rule.method > 1) {
      weight = power(vmulq_f32(vmulq_f32(iou, iou), vdupq_n_f32(rule.steepness)));
    } else {
      const uint32x4_t over = vcgtq_f32(iou, vdupq_n_f32(rule.threshold));
      weight = vbslq_f32(over, rule.method == 0 ? zero : vsubq_f32(one, iou), one);
    }
    const float32x4_t score = vmulq_f32(vreinterpretq_f32_s32(mirror(key)), weight);
    const uint32x4_t fair = vandq_u32(vcgtq_f32(weight, zero), vcgeq_f32(score, vdupq_n_f32(rule.min_score)));
    const int32x4_t decayed = mirror(vreinterpretq_s32_f32(vaddq_f32(score, zero)));
    const int32x4_t now = vbslq_s32(touch, vbslq_s32(fair, decayed, none), key);
    vst1q_s32(f.key + at, now);
    best = vmaxq_s32(best, now);
    gone += static_cast<uint32_t>(__builtin_popcount(lanes(vbicq_u32(touch, fair))));
  }
  f.top[block] = vmaxvq_s32(best);
  return gone;
}

inline int32_t greatest(const int32_t* keys, size_t n) {
  int32x4_t best = vld1q_s32(keys);
  for (size_t i = 4; i < n; i += 4) best = vmaxq_s32(best, vld1q_s32(keys + i));
  return vmaxvq_s32(best);
}

inline int32_t drop(int32_t* keys, size_t lane) {
  keys[lane] = kGone;
  return greatest(keys, kBlock);
}

inline uint32_t equal(const int32_t* keys, int32_t key) {
  const int32x4_t wanted = vdupq_n_s32(key);
  uint32_t mask_bits = 0;
  for (size_t j = 0; j < kBlock; j += 4) mask_bits |= lanes(vceqq_s32(vld1q_s32(keys + j), wanted)) << j;
  return mask_bits;
}

}  // namespace

CALMCLIP_SOFT_NMS(neon)

}  // namespace calmclip
