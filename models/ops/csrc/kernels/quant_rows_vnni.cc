#include "quant_rows.h"

#include <immintrin.h>

#include <cstring>

namespace calmclip {

extern "C" QuantLayerNorm quant_layer_norm_vnni;
extern "C" QuantRows quant_rows_vnni;
extern "C" QuantPatches quant_patches_vnni;
extern "C" CutWindows cut_windows_vnni;

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 4")
#endif

namespace {

struct V {
  using F = __m512;
  using I = __m512i;
  static constexpr size_t kWidth = 16;
  struct All {};
  struct Rest {
    __mmask16 mask;
    explicit Rest(size_t n) : mask(static_cast<__mmask16>((1u << n) - 1)) {}
  };

  static void ahead(const float* p) { __builtin_prefetch(reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(p))); }
  static F set(float v) { return _mm512_set1_ps(v); }
  static I set(int32_t v) { return _mm512_set1_epi32(v); }
  static F load(const float* p, All) { return _mm512_loadu_ps(p); }
  static F load(const float* p, Rest rest) { return _mm512_maskz_loadu_ps(rest.mask, p); }
  static I load(const int32_t* p, All) { return _mm512_loadu_si512(p); }
  static I load(const int32_t* p, Rest rest) { return _mm512_maskz_loadu_epi32(rest.mask, p); }
  static F only(F x, All) { return x; }
  static F only(F x, Rest rest) { return _mm512_maskz_mov_ps(rest.mask, x); }
  static void store(float* p, F x, All) { _mm512_storeu_ps(p, x); }
  static void store(float* p, F x, Rest rest) { _mm512_mask_storeu_ps(p, rest.mask, x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static float total(F x) { return _mm512_reduce_add_ps(x); }
  static F larger(F a, F b) { return _mm512_max_ps(a, b); }
  static F absolute(F x) { return _mm512_abs_ps(x); }
  static float most(F x) { return _mm512_reduce_max_ps(x); }
  static __m128i sixteen(F x, I zero) {
    const I y = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_min_ps(x, set(1024.0f))), zero);  // fits int32
    return _mm512_cvtusepi32_epi8(_mm512_max_epi32(y, set(0)));
  }
  static void bytes(uint8_t* p, F x, I zero, All) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), sixteen(x, zero)); }
  static void bytes(uint8_t* p, F x, I zero, Rest rest) { _mm_mask_storeu_epi8(p, rest.mask, sixteen(x, zero)); }
};

#include "quant_rows_body.inc"

}  // namespace

void quant_layer_norm_vnni(const NormRows& rows, float* room) { norm_rows(rows, room); }

void quant_rows_vnni(const ScaledRows& rows) { scaled_rows(rows); }

void quant_patches_vnni(const float* x, size_t width, size_t count, uint8_t* y, size_t step, float inverse,
                        int32_t zero) {
  patch_rows(x, width, count, y, step, inverse, zero);
}

void cut_windows_vnni(const Windows& windows) { cut_windows(windows); }

}  // namespace calmclip
