#include "softmax_rows.h"

#include <immintrin.h>

#include <cfloat>
#include <cmath>
#include <cstdint>

namespace calmclip {

extern "C" SoftmaxRows softmax_reload_avx2, softmax_recompute_avx2, softmax_two_pass_avx2;

namespace {

// first(n) reads 8 of these from index 8 - n on: n lanes on, the others off.
alignas(64) constexpr int32_t kLanes[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

struct V {
  using F = __m256;
  static constexpr size_t kWidth = 8, kGroup = 4;

  static __m256i first(size_t n) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kLanes + 8 - n)); }
  static F set(float v) { return _mm256_set1_ps(v); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load(const float* p, size_t n, float fill) {
    const __m256i mask = first(n);
    return _mm256_blendv_ps(set(fill), _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask));
  }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static void store(float* p, F v, size_t n) { _mm256_maskstore_ps(p, first(n), v); }
  static void stream(float* p, F v) { _mm256_stream_ps(p, v); }
  static void fence() { _mm_sfence(); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F reduce(F x, F n);
  static F power(F z) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(z), 23)); }
  static F scale(F m, F s);
  static float highest(F v) {
    __m128 h = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
  }
  static float total(F v) {
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
  }

  // Subnormal results cost some 150 cycles each; 0x8040 flushes them to zero and reads them as zero.
  struct Flush {
    unsigned before = _mm_getcsr();
    Flush() { _mm_setcsr(before | 0x8040); }
    ~Flush() { _mm_setcsr(before); }
    Flush(const Flush&) = delete;
    Flush& operator=(const Flush&) = delete;
  };
};

#include "softmax_rows_body.inc"

inline F V::reduce(F x, F n) { return _mm256_fmsub_ps(x, set(kLog2e), n); }
inline F V::scale(F m, F s) { return mul(m, power(add(max(s, set(-127.0f)), set(kBias)))); }

}  // namespace

void softmax_reload_avx2(const float* x, float* y, size_t rows, size_t cols, float gamma, float zeta, bool) {
  all_rows<Reload>(x, y, rows, cols, gamma, zeta, false);
}

void softmax_recompute_avx2(const float* x, float* y, size_t rows, size_t cols, float gamma, float zeta, bool stream) {
  all_rows<Recompute>(x, y, rows, cols, gamma, zeta, stream);
}

void softmax_two_pass_avx2(const float* x, float* y, size_t rows, size_t cols, float gamma, float zeta, bool stream) {
  all_rows<TwoPass>(x, y, rows, cols, gamma, zeta, stream);
}

}  // namespace calmclip
