#include "quant_rows.h"

#include <cstring>

namespace calmclip {

extern "C" QuantLayerNorm quant_layer_norm_scalar;
extern "C" QuantRows quant_rows_scalar;
extern "C" QuantPatches quant_patches_scalar;
extern "C" CutWindows cut_windows_scalar;

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 4")
#endif

namespace {

struct V {
  using F = float;
  using I = int32_t;
  static constexpr size_t kWidth = 1;
  struct All {};
  struct Rest {
    explicit Rest(size_t) {}  // never used with one lane
  };

  static void ahead(const float* p) { __builtin_prefetch(reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(p))); }
  static F set(float v) { return v; }
  static I set(int32_t v) { return v; }
  template <class T, class Which>
  static T load(const T* p, Which) {
    return *p;
  }
  template <class Which>
  static F only(F x, Which) {
    return x;
  }
  template <class Which>
  static void store(float* p, F x, Which) {
    *p = x;
  }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F fma(F a, F b, F c) { return __builtin_fmaf(a, b, c); }
  static F larger(F a, F b) { return a > b ? a : b; }
  static F absolute(F x) { return __builtin_fabsf(x); }
  static float total(F x) { return x; }
  static float most(F x) { return x; }
  template <class Which>
  static void bytes(uint8_t* p, F x, I zero, Which) {
    // adding it to a float within +-2^22 rounds that, half to even
    x = x > -1024.0f ? x < 1024.0f ? x : 1024.0f : -1024.0f;
    const I y = static_cast<I>((x + 12582912.0f) - 12582912.0f) + zero;
    *p = static_cast<uint8_t>(y < 0 ? 0 : y > 255 ? 255 : y);
  }
};

#include "quant_rows_body.inc"

}  // namespace

void quant_layer_norm_scalar(const NormRows& rows, float* room) { norm_rows(rows, room); }

void quant_rows_scalar(const ScaledRows& rows) { scaled_rows(rows); }

void quant_patches_scalar(const float* x, size_t width, size_t count, uint8_t* y, size_t step, float inverse,
                          int32_t zero) {
  patch_rows(x, width, count, y, step, inverse, zero);
}

void cut_windows_scalar(const Windows& windows) { cut_windows(windows); }

}  // namespace calmclip
