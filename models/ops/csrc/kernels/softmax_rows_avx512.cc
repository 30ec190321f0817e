#include "softmax_rows.h"

#include <immintrin.h>

#include <cfloat>
#include <cmath>
#include <cstdint>

namespace calmclip {

extern "C" SoftmaxRows softmax_reload_avx512, softmax_recompute_avx512, softmax_two_pass_avx512;

namespace {

struct V {
  using F = __m512;
  static constexpr size_t kWidth = 16, kGroup = 8;

  static __mmask16 first(size_t n) { return static_cast<__mmask16>((1u << n) - 1); }
  static F set(float v) { return _mm512_set1_ps(v); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load(const float* p, size_t n, float fill) { return _mm512_mask_loadu_ps(set(fill), first(n), p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static void store(float* p, F v, size_t n) { _mm512_mask_storeu_ps(p, first(n), v); }
  static void stream(float* p, F v) { _mm512_stream_ps(p, v); }
  static void fence() { _mm_sfence(); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F reduce(F x, F n);
  static F power(F z) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(z), 23)); }
  static F scale(F m, F s) { return _mm512_scalef_ps(m, s); }
  // Every lane: all of v combined. Halves are combined step by step, so no lane is broadcast at the end.
  template <class Both>
  static F across(F v, Both both) {
    v = both(v, _mm512_shuffle_f32x4(v, v, 0x4e));
    v = both(v, _mm512_shuffle_f32x4(v, v, 0xb1));
    v = both(v, _mm512_permute_ps(v, 0x4e));
    return both(v, _mm512_permute_ps(v, 0xb1));
  }
  static F highest_all(F v) { return across(v, [](F a, F b) { return max(a, b); }); }
  static F total_all(F v) { return across(v, [](F a, F b) { return add(a, b); }); }
  static float highest(F v) { return _mm512_cvtss_f32(highest_all(v)); }
  static float total(F v) { return _mm512_cvtss_f32(total_all(v)); }

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

inline F V::reduce(F x, F n) { return _mm512_fmsub_ps(x, set(kLog2e), n); }

#if defined(__clang__)
#define CALMCLIP_UNROLL _Pragma("unroll")
#else
#define CALMCLIP_UNROLL _Pragma("GCC unroll 64")
#endif

// Rows of `count` vectors, the last with 1 to 16 values; they stay in registers from load to store.
template <size_t count, bool plain>
void held_rows(const float* x, float* y, size_t rows, size_t cols, float gamma, float zeta) {
  constexpr size_t last = count - 1, w = V::kWidth;
  const __mmask16 tail = V::first(cols - last * w);
  const F one = V::set(1.0f), low = V::set(gamma), nothing = V::set(kLowest);
  const float span = zeta - gamma;
  // The first vector of a row is loaded before the row before it is stored. If x == y, a load that overlaps the masked
  // store of a row's last vector would wait until that store has reached the cache.
  const __mmask16 whole = count == 1 ? tail : V::first(w);
  F next = rows ? _mm512_mask_loadu_ps(nothing, whole, x) : nothing;
  for (size_t r = 0; r < rows; ++r, x += cols, y += cols) {
    F v[count];
    CALMCLIP_UNROLL for (size_t k = 0; k < count; ++k) ahead(x + k * w), ahead_of_store(y + k * w);
    v[0] = next;
    CALMCLIP_UNROLL for (size_t k = 1; k < last; ++k) v[k] = V::load(x + k * w);
    if (count > 1) v[last] = _mm512_mask_loadu_ps(nothing, tail, x + last * w);
    if (r + 1 < rows) next = _mm512_mask_loadu_ps(nothing, whole, x + cols);
    F part[4] = {nothing, nothing, nothing, nothing};
    CALMCLIP_UNROLL for (size_t k = 0; k < count; ++k) part[k % 4] = V::max(v[k], part[k % 4]);
    const F top = V::highest_all(V::max(V::max(part[0], part[1]), V::max(part[2], part[3])));
    if (_mm512_cvtss_f32(top) == kLowest) {
      masked_row(x, y, cols, gamma, zeta);
      continue;
    }
    part[0] = part[1] = part[2] = part[3] = V::set(0);
    CALMCLIP_UNROLL for (size_t k = 0; k < count; ++k) {
      v[k] = exp_below(V::sub(v[k], top));
      part[k % 4] = k < 4 ? v[k] : V::add(part[k % 4], v[k]);
    }
    const F sum = V::total_all(V::add(V::add(part[0], part[1]), V::add(part[2], part[3])));
    const F factor = V::set(span / _mm512_cvtss_f32(sum));
    CALMCLIP_UNROLL for (size_t k = 0; k < count; ++k) {
      v[k] = plain ? V::mul(v[k], factor) : V::min(one, V::max(V::set(0), V::fma(v[k], factor, low)));
    }
    CALMCLIP_UNROLL for (size_t k = 0; k < last; ++k) V::store(y + k * w, v[k]);
    _mm512_mask_storeu_ps(y + last * w, tail, v[last]);
  }
}

constexpr size_t kHeld = 20;  // vectors; with the constants of exp all 32 registers are in use

using HeldRows = void(const float*, float*, size_t, size_t, float, float);

template <bool plain>
constexpr HeldRows* kHeldRows[kHeld] = {
    held_rows<1, plain>,  held_rows<2, plain>,  held_rows<3, plain>,  held_rows<4, plain>,  held_rows<5, plain>,
    held_rows<6, plain>,  held_rows<7, plain>,  held_rows<8, plain>,  held_rows<9, plain>,  held_rows<10, plain>,
    held_rows<11, plain>, held_rows<12, plain>, held_rows<13, plain>, held_rows<14, plain>, held_rows<15, plain>,
    held_rows<16, plain>, held_rows<17, plain>, held_rows<18, plain>, held_rows<19, plain>, held_rows<20, plain>,
};

}  // namespace

void softmax_reload_avx512(const float* x, float* y, size_t rows, size_t cols, float gamma, float zeta, bool) {
  if (cols == 0 || cols > kHeld * V::kWidth) return all_rows<Reload>(x, y, rows, cols, gamma, zeta, false);
  const V::Flush flush;
  const size_t count = (cols + V::kWidth - 1) / V::kWidth;
  const bool plain = gamma == 0 && zeta == 1;
  (plain ? kHeldRows<true> : kHeldRows<false>)[count - 1](x, y, rows, cols, gamma, zeta);
}

void softmax_recompute_avx512(const float* x, float* y, size_t rows, size_t cols, float gamma, float zeta,
                              bool stream) {
  all_rows<Recompute>(x, y, rows, cols, gamma, zeta, stream);
}

void softmax_two_pass_avx512(const float* x, float* y, size_t rows, size_t cols, float gamma, float zeta,
                             bool stream) {
  all_rows<TwoPass>(x, y, rows, cols, gamma, zeta, stream);
}

}  // namespace calmclip
