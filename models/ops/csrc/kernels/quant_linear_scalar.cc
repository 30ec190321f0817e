#include "quant_linear.h"

#include <cmath>
#include <cstring>

#include "activation_curve.h"
#include "quant_conv.h"

namespace calmclip {

extern "C" QuantLinear quant_linear_scalar;
extern "C" QuantConv quant_conv_scalar;
extern "C" QuantConvTiles quant_conv_tiles_scalar;
extern "C" Int8Peak int8_peak_scalar;

namespace {

struct V {
  using F = float;
  using I = int32_t;
  using Zero = const int32_t*;
  struct Floored {
    Zero zero;
    const uint8_t* floor;
    Floored(Zero zero, const uint8_t* floor) : zero(zero), floor(floor) {}
  };
  static constexpr size_t kWidth = 1, kRows = 1;

  static void product(size_t, const Product& p) {
    uint32_t sum[kPanel];  // `start` may overflow int32; the final sum fits
    std::memcpy(sum, p.from, sizeof sum);
    const int8_t* w = p.panel;
    for (size_t i = 0; i < p.steps; ++i)
      for (size_t c = 0; c < kPanel; ++c, w += 4)
        for (size_t k = 0; k < 4; ++k) sum[c] += static_cast<uint32_t>(p.x[4 * i + k] * w[k]);
    std::memcpy(p.sums, sum, sizeof sum);
  }

  static F set(float v) { return v; }
  static F load(const float* p) { return *p; }
  static I load(const int32_t* p) { return *p; }
  static void store(float* p, F v) { *p = v; }
  static uint8_t byte(I v, I floor) { return static_cast<uint8_t>(v < floor ? floor : v > 255 ? 255 : v); }
  static void store(uint8_t* p, const I* v, Zero zero) {
    for (size_t c = 0; c < kPanel; ++c) p[c] = byte(v[c] + zero[c], 0);
  }
  static void store(uint8_t* p, const I* v, const Floored& zero) {
    for (size_t c = 0; c < kPanel; ++c) p[c] = byte(v[c] + zero.zero[c], zero.floor[c]);
  }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F fused(F a, F b, F c) { return std::fma(a, b, c); }
  static F max(F a, F b) { return a > b ? a : b; }
  static F min(F a, F b) { return a < b ? a : b; }
  static F absolute(F v) { return std::fabs(v); }
  static F to_float(I v) { return static_cast<float>(v); }
  static I to_int(F v) { return static_cast<I>(std::nearbyint(max(v, -512))); }

  struct Table {
    const float (&c)[4][kIntervals];
    explicit Table(const ActivationCurve& curve) : c(curve.c) {}
    void find(F v, F (&result)[4]) const {
      uint32_t bits;
      std::memcpy(&bits, &v, sizeof bits);
      for (size_t k = 0; k < 4; ++k) result[k] = c[k][(bits >> kIntervalShift) % kIntervals];
    }
  };
};

#include "quant_linear_body.inc"
#include "quant_conv_body.inc"

struct W {
  using S = int16_t;
  static constexpr size_t kShorts = 1, kRows = 1, kBlock = 4;
  static S bytes(const uint8_t* p, S zero) { return static_cast<S>(*p - zero); }
  static S set(int16_t x) { return x; }
  static S add16(S a, S b) { return static_cast<S>(a + b); }
  static S sub16(S a, S b) { return static_cast<S>(a - b); }
  template <int factor>
  static S times16(S x) {
    return static_cast<S>(x * factor);
  }
  static void store16(int16_t* p, S x) { *p = x; }

  static void product(size_t, const Product& p) {
    uint32_t sum[kPanel] = {};
    const int8_t* w = p.panel;
    for (size_t i = 0; i < p.steps; ++i)
      for (size_t c = 0; c < kPanel; ++c, w += 4) {
        int16_t x[2], y[2];
        std::memcpy(x, p.x + 4 * i, sizeof x);
        std::memcpy(y, w, sizeof y);
        for (size_t k = 0; k < 2; ++k) sum[c] += static_cast<uint32_t>(x[k] * y[k]);
      }
    std::memcpy(p.sums, sum, sizeof sum);
  }

  static V::I signed_of(uint32_t x) { return static_cast<V::I>(x); }
  static uint32_t of(V::I x) { return static_cast<uint32_t>(x); }
  static V::I add32(V::I a, V::I b) { return signed_of(of(a) + of(b)); }
  static V::I sub32(V::I a, V::I b) { return signed_of(of(a) - of(b)); }
  template <int factor>
  static V::I times32(V::I x) {
    return signed_of(of(x) * factor);
  }
  static V::I quotient(V::I x) { return signed_of(of(x) * kNinth) >> 6; }
  static void store32(int32_t* p, V::I x) { *p = x; }
};

#include "quant_conv_tiles_body.inc"

}  // namespace

void quant_conv_scalar(const ConvWork& work, const ConvPart& part) { conv<12>(work, part, sum_tile); }

void quant_conv_tiles_scalar(const ConvWork& work, const ConvTilesPart& part) { conv_tiles(work, part); }

void quant_linear_scalar(const LinearWork& work, size_t first, size_t last) { linear(work, first, last); }

int32_t int8_peak_scalar(size_t rounds) {
  uint8_t x[kPeakMacs / 24];
  int8_t w[kPeakMacs / 24];
  for (size_t i = 0; i < sizeof x; ++i) {
    x[i] = static_cast<uint8_t>(i);
    w[i] = static_cast<int8_t>(i);
  }
  int32_t sum = 0;
  for (size_t i = 0; i < 24 * rounds; ++i) {
    asm volatile("" : : "r"(x), "r"(w) : "memory");  // without it the compiler computes one product with 24 * rounds
    int32_t once = 0;
    for (size_t k = 0; k < sizeof x; ++k) once += x[k] * w[k];
    sum ^= once;
  }
  return sum;
}

}  // namespace calmclip
