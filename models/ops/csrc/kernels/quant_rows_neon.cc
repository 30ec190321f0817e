#include "quant_rows.h"

#include <arm_neon.h>

#include <cstring>

#include "bytes_neon.h"

namespace calmclip {

extern "C" QuantLayerNorm quant_layer_norm_neon;
extern "C" QuantRows quant_rows_neon;
extern "C" QuantPatches quant_patches_neon;
extern "C" CutWindows cut_windows_neon;

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 4")
#endif

namespace {

// Four registers, whose numbers become one register of bytes. They are also the floats of a cache line.
struct Floats {
  float32x4_t a, b, c, d;
};
struct Ints {
  int32x4_t a, b, c, d;
};

struct V {
  using F = Floats;
  using I = Ints;
  static constexpr size_t kWidth = 16;
  struct All {};
  struct Rest {
    size_t n;
    explicit Rest(size_t count) : n(count) {}
  };

  static void ahead(const float* p) { __builtin_prefetch(reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(p))); }
  static F set(float v) { return {vdupq_n_f32(v), vdupq_n_f32(v), vdupq_n_f32(v), vdupq_n_f32(v)}; }
  static I set(int32_t v) { return {vdupq_n_s32(v), vdupq_n_s32(v), vdupq_n_s32(v), vdupq_n_s32(v)}; }
  static F load(const float* p, All) { return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
  static I load(const int32_t* p, All) { return {vld1q_s32(p), vld1q_s32(p + 4), vld1q_s32(p + 8), vld1q_s32(p + 12)}; }
  static F load(const float* p, Rest rest) {
    const I bits = some(p, rest.n);
    return {vreinterpretq_f32_s32(bits.a), vreinterpretq_f32_s32(bits.b), vreinterpretq_f32_s32(bits.c),
            vreinterpretq_f32_s32(bits.d)};
  }
  static I load(const int32_t* p, Rest rest) { return some(p, rest.n); }
  static F only(F x, All) { return x; }
  static F only(F x, Rest rest) {
    const auto keep = [&](float32x4_t v, int32_t first) {
      const int32x4_t lane = {first, first + 1, first + 2, first + 3};
      const uint32x4_t mask = vcltq_s32(lane, vdupq_n_s32(static_cast<int32_t>(rest.n)));
      return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), mask));
    };
    return {keep(x.a, 0), keep(x.b, 4), keep(x.c, 8), keep(x.d, 12)};
  }
  static void store(float* p, F x, All) {
    vst1q_f32(p, x.a);
    vst1q_f32(p + 4, x.b);
    vst1q_f32(p + 8, x.c);
    vst1q_f32(p + 12, x.d);
  }
  static void store(float* p, F x, Rest rest) {
    const float32x4_t four[4] = {x.a, x.b, x.c, x.d};
    size_t i = 0;
    for (; 4 * i + 4 <= rest.n; ++i) vst1q_f32(p + 4 * i, four[i]);
    if (rest.n % 4) store_first(reinterpret_cast<uint8_t*>(p + 4 * i), vreinterpretq_u8_f32(four[i]), rest.n % 4 * 4);
  }
  static F add(F x, F y) {
    return {vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b), vaddq_f32(x.c, y.c), vaddq_f32(x.d, y.d)};
  }
  static F sub(F x, F y) {
    return {vsubq_f32(x.a, y.a), vsubq_f32(x.b, y.b), vsubq_f32(x.c, y.c), vsubq_f32(x.d, y.d)};
  }
  static F mul(F x, F y) {
    return {vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b), vmulq_f32(x.c, y.c), vmulq_f32(x.d, y.d)};
  }
  static F fma(F x, F y, F z) {
    return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b), vfmaq_f32(z.c, x.c, y.c), vfmaq_f32(z.d, x.d, y.d)};
  }
  static float total(F x) {
    const float32x4_t four = vaddq_f32(vaddq_f32(x.a, x.c), vaddq_f32(x.b, x.d));
    return vaddv_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)));
  }
  static F larger(F x, F y) {  // a number, if one of the two is NaN
    return {vmaxnmq_f32(x.a, y.a), vmaxnmq_f32(x.b, y.b), vmaxnmq_f32(x.c, y.c), vmaxnmq_f32(x.d, y.d)};
  }
  static F absolute(F x) { return {vabsq_f32(x.a), vabsq_f32(x.b), vabsq_f32(x.c), vabsq_f32(x.d)}; }
  static float most(F x) { return vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(x.a, x.b), vmaxnmq_f32(x.c, x.d))); }

  // Every conversion saturates, so no number needs a limit before it. The zero is added in 16 bits.
  static uint8x16_t sixteen(F x, I zero) {
    const int16x8_t low = vqmovn_high_s32(vqmovn_s32(vcvtnq_s32_f32(x.a)), vcvtnq_s32_f32(x.b));
    const int16x8_t high = vqmovn_high_s32(vqmovn_s32(vcvtnq_s32_f32(x.c)), vcvtnq_s32_f32(x.d));
    const int16x8_t low_zero = vuzp1q_s16(vreinterpretq_s16_s32(zero.a), vreinterpretq_s16_s32(zero.b));
    const int16x8_t high_zero = vuzp1q_s16(vreinterpretq_s16_s32(zero.c), vreinterpretq_s16_s32(zero.d));
    return vqmovun_high_s16(vqmovun_s16(vqaddq_s16(low, low_zero)), vqaddq_s16(high, high_zero));
  }
  static void bytes(uint8_t* p, F x, I zero, All) { vst1q_u8(p, sixteen(x, zero)); }
  static void bytes(uint8_t* p, F x, I zero, Rest rest) { store_first(p, sixteen(x, zero), rest.n); }

 private:
  // n 32-bit numbers, 1 .. 15, then 0.
  template <class T>
  static I some(const T* p, size_t n) {
    int32x4_t four[4];
    for (size_t i = 0; i < 4; ++i, p += 4, n = n > 4 ? n - 4 : 0) {
      const auto* const bytes = reinterpret_cast<const uint8_t*>(p);
      four[i] = vreinterpretq_s32_u8(n >= 4 ? vld1q_u8(bytes) : n ? first_bytes(bytes, 4 * n) : vdupq_n_u8(0));
    }
    return {four[0], four[1], four[2], four[3]};
  }
};

#include "quant_rows_body.inc"

}  // namespace

void quant_layer_norm_neon(const NormRows& rows, float* room) { norm_rows(rows, room); }

void quant_rows_neon(const ScaledRows& rows) { scaled_rows(rows); }

void quant_patches_neon(const float* x, size_t width, size_t count, uint8_t* y, size_t step, float inverse,
                        int32_t zero) {
  patch_rows(x, width, count, y, step, inverse, zero);
}

void cut_windows_neon(const Windows& windows) { cut_windows(windows); }

}  // namespace calmclip
