// gelu, gelu_tanh, quick_gelu and silu as piecewise cubic tables. Each function is max(x, 0) - h(|x|), because x g(x) + x
// g(-x) = x. h is small, smooth, and 0 for large |x|. With v = 1 + pitch |x|, limited to less than 16, h is a cubic in
// v in each of 32 intervals. Each octave of v has eight intervals of equal width, so the top bits of v's mantissa and
// the lowest two bits of its exponent are the number of the interval. Intervals are narrow where h bends, and a shift
// finds the interval. The error is less than 1e-6. +inf stays, -inf becomes 0, NaN stays.
#pragma once

#include <cstddef>

namespace calmclip {

inline constexpr size_t kIntervals = 32;
inline constexpr int kIntervalShift = 20;       // the lowest five bits of v >> 20 number the interval
inline constexpr float kHighestV = 0x1.fffffep3f;

struct ActivationCurve {
  using Coefficients = float[4][kIntervals];
  float pitch;
  Coefficients c;                     // h = ((c3 v + c2) v + c1) v + c0
  alignas(16) float at[kIntervals][4];  // the same, interval by interval
  operator const Coefficients&() const { return c; }
};

// Indices into spec.ACTIVATIONS.
inline constexpr int kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kQuickGelu = 4, kSilu = 5;

// Null for kNone and kRelu, which have no curve.
const ActivationCurve* activation_curve(int activation);

}  // namespace calmclip
