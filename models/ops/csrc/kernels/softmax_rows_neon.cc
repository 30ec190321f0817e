#include "softmax_rows.h"

#include <arm_neon.h>

#include <cfloat>
#include <cmath>
#include <cstdint>

namespace calmclip {

extern "C" SoftmaxRows softmax_reload_neon, softmax_recompute_neon, softmax_two_pass_neon;

namespace {

struct V {
  using F = float32x4_t;
  static constexpr size_t kWidth = 4, kGroup = 4;

  static F set(float v) { return vdupq_n_f32(v); }
  static F load(const float* p) { return vld1q_f32(p); }
  static F load(const float* p, size_t n, float fill) {
    float lanes[kWidth] = {fill, fill, fill, fill};
    for (size_t i = 0; i < n; ++i) lanes[i] = p[i];
    return vld1q_f32(lanes);
  }
  static void store(float* p, F v) { vst1q_f32(p, v); }
  static void store(float* p, F v, size_t n) {
    float lanes[kWidth];
    vst1q_f32(lanes, v);
    for (size_t i = 0; i < n; ++i) p[i] = lanes[i];
  }
  static void stream(float* p, F v) { vst1q_f32(p, v); }  // no such store; the processor detects streams
  static void fence() {}
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F max(F a, F b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static F min(F a, F b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
  static F reduce(F x, F n);
  static F power(F z) { return vreinterpretq_f32_s32(vshlq_n_s32(vreinterpretq_s32_f32(z), 23)); }
  static F scale(F m, F s);
  static float highest(F v) { return vmaxnmvq_f32(v); }
  static float total(F v) { return vaddvq_f32(v); }

  struct Flush {  // subnormals cost nothing here
    Flush() {}
    ~Flush() {}
  };
};

#include "softmax_rows_body.inc"

inline F V::reduce(F x, F n) { return vfmaq_f32(vnegq_f32(n), x, set(kLog2e)); }
inline F V::scale(F m, F s) { return mul(m, power(add(max(s, set(-127.0f)), set(kBias)))); }

}  // namespace

void softmax_reload_neon(const float* x, float* y, size_t rows, size_t cols, float gamma, float zeta, bool) {
  all_rows<Reload>(x, y, rows, cols, gamma, zeta, false);
}

void softmax_recompute_neon(const float* x, float* y, size_t rows, size_t cols, float gamma, float zeta, bool stream) {
  all_rows<Recompute>(x, y, rows, cols, gamma, zeta, stream);
}

void softmax_two_pass_neon(const float* x, float* y, size_t rows, size_t cols, float gamma, float zeta, bool stream) {
  all_rows<TwoPass>(x, y, rows, cols, gamma, zeta, stream);
}

}  // namespace calmclip
