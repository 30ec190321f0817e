#include "rotary_attention.h"

#include <arm_neon.h>

namespace calmclip {

extern "C" RotaryAttention rotary_attention_neon;

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace {

float32x4_t within(float32x4_t x, float32x4_t s, float32x4_t a, float32x4_t b) {
  return vbslq_f32(vandq_u32(vcleq_f32(a, s), vcltq_f32(s, b)), x, vdupq_n_f32(kLowest));
}

float32x4_t raise(float32x4_t p, float32x4_t n) {
  return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p), vshlq_n_s32(vreinterpretq_s32_f32(n), 23)));
}

// Sixteen rows: a broadcast number meets four registers, so that products take longer than loads, also on processors
// with one load a cycle. The sums of six keys take 24 of the 32 registers.
namespace many {

struct Floats {
  float32x4_t a, b, c, d;
  friend Floats operator+(Floats x, Floats y) { return {x.a + y.a, x.b + y.b, x.c + y.c, x.d + y.d}; }
  friend Floats operator-(Floats x, Floats y) { return {x.a - y.a, x.b - y.b, x.c - y.c, x.d - y.d}; }
  friend Floats operator*(Floats x, Floats y) { return {x.a * y.a, x.b * y.b, x.c * y.c, x.d * y.d}; }
  friend Floats operator/(Floats x, Floats y) { return {x.a / y.a, x.b / y.b, x.c / y.c, x.d / y.d}; }
};

struct V {
  using F = Floats;
  static constexpr size_t kWidth = 16, kTile = 6;
  static F set(float v) { return {vdupq_n_f32(v), vdupq_n_f32(v), vdupq_n_f32(v), vdupq_n_f32(v)}; }
  static F load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
  static void store(float* p, F v) {
    vst1q_f32(p, v.a);
    vst1q_f32(p + 4, v.b);
    vst1q_f32(p + 8, v.c);
    vst1q_f32(p + 12, v.d);
  }
  static F fma(F x, F y, F z) {
    return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b), vfmaq_f32(z.c, x.c, y.c), vfmaq_f32(z.d, x.d, y.d)};
  }
  static F max(F x, F y) {
    return {vmaxnmq_f32(x.a, y.a), vmaxnmq_f32(x.b, y.b), vmaxnmq_f32(x.c, y.c), vmaxnmq_f32(x.d, y.d)};
  }
  static F min(F x, F y) {
    return {vminnmq_f32(x.a, y.a), vminnmq_f32(x.b, y.b), vminnmq_f32(x.c, y.c), vminnmq_f32(x.d, y.d)};
  }
  static F within(F x, F s, F a, F b) {
    return {calmclip::within(x.a, s.a, a.a, b.a), calmclip::within(x.b, s.b, a.b, b.b),
            calmclip::within(x.c, s.c, a.c, b.c), calmclip::within(x.d, s.d, a.d, b.d)};
  }
  static F raise(F p, F n) {
    return {calmclip::raise(p.a, n.a), calmclip::raise(p.b, n.b), calmclip::raise(p.c, n.c),
            calmclip::raise(p.d, n.d)};
  }
};

#include "rotary_attention_body.inc"

}  // namespace many

// Four rows, for a decoder's last token: lanes without a row would be computed in vain.
namespace few {

struct V {
  using F = float32x4_t;
  static constexpr size_t kWidth = 4, kTile = 16;
  static F set(float v) { return vdupq_n_f32(v); }
  static F load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, F v) { vst1q_f32(p, v); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F max(F a, F b) { return vmaxnmq_f32(a, b); }
  static F min(F a, F b) { return vminnmq_f32(a, b); }
  static F within(F x, F s, F a, F b) { return calmclip::within(x, s, a, b); }
  static F raise(F p, F n) { return calmclip::raise(p, n); }
};

#include "rotary_attention_body.inc"

}  // namespace few

constexpr size_t kFewRows = 8;

}  // namespace

void rotary_attention_neon(const AttentionGroup& group, float* scratch) {
  group.rows <= kFewRows ? few::Group(group, scratch).rows() : many::Group(group, scratch).rows();
}

}  // namespace calmclip
