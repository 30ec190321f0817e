// gelu, gelu_tanh and quick_gelu as tables. Each is max(x, 0) - h(|x|), for x g(x) + x g(-x) = x; and h is small, smooth
// and soon 0. With v = 1 + pitch |x|, cut to under 16, h is a cubic in v in each of 32 intervals, eight of equal width to
// an octave of v, so the topmost bits of v's mantissa and the lowest two of its exponent are the interval's number:
// intervals are narrow where h bends, and a processor finds one by a shift. Off by less than 1e-6 everywhere; +inf stays,
// -inf becomes 0, NaN stays.
#pragma once

#include <cstddef>

namespace calmclip {

inline constexpr size_t kIntervals = 32;
inline constexpr int kIntervalShift = 20;       // of the bits of v; the interval's number is the lowest five bits then
inline constexpr float kHighestV = 0x1.fffffep3f;

struct ActivationCurve {
  float pitch;
  float c[4][kIntervals];  // h = ((c3 v + c2) v + c1) v + c0
};

inline constexpr int kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kQuickGelu = 4;  // places in spec.ACTIVATIONS

// Null where the activation has none: for kNone and kRelu.
const ActivationCurve* activation_curve(int activation);

}  // namespace calmclip
