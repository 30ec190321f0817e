#include "quant_rows.h"

#include <immintrin.h>

#include <cstring>

namespace calmclip {

extern "C" QuantLayerNorm quant_layer_norm_avx2;
extern "C" QuantRows quant_rows_avx2;
extern "C" QuantPatches quant_patches_avx2;
extern "C" CutWindows cut_windows_avx2;

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 4")
#endif

namespace {

struct V {
  using F = __m256;
  using I = __m256i;
  static constexpr size_t kWidth = 8;
  struct All {};
  struct Rest {
    size_t n;
    I mask;
    explicit Rest(size_t count)
        : n(count),
          mask(_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(count)),
                                  _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))) {}
  };

  static void ahead(const float* p) { __builtin_prefetch(reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(p))); }
  static F set(float v) { return _mm256_set1_ps(v); }
  static I set(int32_t v) { return _mm256_set1_epi32(v); }
  static F load(const float* p, All) { return _mm256_loadu_ps(p); }
  static F load(const float* p, const Rest& rest) { return _mm256_maskload_ps(p, rest.mask); }
  static I load(const int32_t* p, All) { return _mm256_loadu_si256(reinterpret_cast<const I*>(p)); }
  static I load(const int32_t* p, const Rest& rest) { return _mm256_maskload_epi32(p, rest.mask); }
  static F only(F x, All) { return x; }
  static F only(F x, const Rest& rest) { return _mm256_and_ps(x, _mm256_castsi256_ps(rest.mask)); }
  static void store(float* p, F x, All) { _mm256_storeu_ps(p, x); }
  static void store(float* p, F x, const Rest& rest) { _mm256_maskstore_ps(p, rest.mask, x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static float total(F x) {
    __m128 v = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
  }
  static F larger(F a, F b) { return _mm256_max_ps(a, b); }
  static F absolute(F x) { return _mm256_andnot_ps(set(-0.0f), x); }
  static float most(F x) {
    __m128 v = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    v = _mm_max_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)));
  }
  static uint64_t eight(F x, I zero) {
    const I y = _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_min_ps(x, set(1024.0f))), zero);  // fits int32
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    return static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_packus_epi16(words, words)));
  }
  static void bytes(uint8_t* p, F x, I zero, All) {
    const uint64_t y = eight(x, zero);
    std::memcpy(p, &y, sizeof y);
  }
  static void bytes(uint8_t* p, F x, I zero, const Rest& rest) {
    const uint64_t y = eight(x, zero);
    std::memcpy(p, &y, rest.n);
  }
};

#include "quant_rows_body.inc"

}  // namespace

void quant_layer_norm_avx2(const NormRows& rows, float* room) { norm_rows(rows, room); }

void quant_rows_avx2(const ScaledRows& rows) { scaled_rows(rows); }

void quant_patches_avx2(const float* x, size_t width, size_t count, uint8_t* y, size_t step, float inverse,
                        int32_t zero) {
  patch_rows(x, width, count, y, step, inverse, zero);
}

void cut_windows_avx2(const Windows& windows) { cut_windows(windows); }

}  // namespace calmclip
