#include "softmax_rows.h"

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace calmclip {

extern "C" SoftmaxRows softmax_reload_scalar, softmax_recompute_scalar, softmax_two_pass_scalar;

namespace {

struct V {
  using F = float;
  static constexpr size_t kWidth = 1, kGroup = 4;

  static F set(float v) { return v; }
  static F load(const float* p) { return *p; }
  static F load(const float*, size_t, float fill) { return fill; }  // one lane: a row has no partial vector
  static void store(float* p, F v) { *p = v; }
  static void store(float*, F, size_t) {}
  static void stream(float* p, F v) { *p = v; }
  static void fence() {}
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F max(F a, F b) { return a > b ? a : b; }
  static F min(F a, F b) { return a < b ? a : b; }
  static F reduce(F x, F n);
  static F power(F z) {
    uint32_t bits;
    std::memcpy(&bits, &z, sizeof bits);
    bits <<= 23;
    std::memcpy(&z, &bits, sizeof z);
    return z;
  }
  static F scale(F m, F s);
  static float highest(F v) { return v; }
  static float total(F v) { return v; }

  struct Flush {
    Flush() {}
    ~Flush() {}
  };
};

#include "softmax_rows_body.inc"

// A double holds a float product exactly, so this rounds as the fused operations of the vector kernels do.
inline F V::reduce(F x, F n) { return static_cast<float>(double{x} * double{kLog2e} - double{n}); }
inline F V::scale(F m, F s) { return m * power((s > -127.0f ? s : -127.0f) + kBias); }

}  // namespace

void softmax_reload_scalar(const float* x, float* y, size_t rows, size_t cols, float gamma, float zeta, bool) {
  all_rows<Reload>(x, y, rows, cols, gamma, zeta, false);
}

void softmax_recompute_scalar(const float* x, float* y, size_t rows, size_t cols, float gamma, float zeta,
                              bool stream) {
  all_rows<Recompute>(x, y, rows, cols, gamma, zeta, stream);
}

void softmax_two_pass_scalar(const float* x, float* y, size_t rows, size_t cols, float gamma, float zeta,
                             bool stream) {
  all_rows<TwoPass>(x, y, rows, cols, gamma, zeta, stream);
}

}  // namespace calmclip
