#include "activation_curve.h"

#include <cmath>

#include "old_exp.h"

namespace calmclip {
namespace {

constexpr double kPi = 3.141592653589793;

double gelu(double u) { return u * 0.5 * std::erfc(u / std::sqrt(2.0)); }
double gelu_tanh(double u) { return u / (1 + std::exp(2 * std::sqrt(2 / kPi) * (u + 0.044715 * u * u * u))); }
double quick_gelu(double u) { return u / (1 + std::exp(1.702 * u)); }
double silu(double u) { return u / (1 + std::exp(u)); }

// h is approximated by the cubic through its values at the four Chebyshev nodes of each interval; Newton's form,
// multiplied out.
ActivationCurve fit(double (*h)(double), float pitch) {
  ActivationCurve curve{pitch, {}, {}};
  for (size_t i = 0; i < kIntervals; ++i) {
    const double octave = std::ldexp(1.0, static_cast<int>((i / 8 + 1) % 4));  // biased exponents end in 11, 00, 01, 10
    const double low = octave * (1 + static_cast<double>(i % 8) / 8), width = octave / 8;
    double node[4], d[4];
    for (int k = 0; k < 4; ++k) {
      node[k] = low + width * (0.5 - 0.5 * std::cos((2 * k + 1) * kPi / 8));
      d[k] = h((node[k] - 1) / double{pitch});
    }
    for (int order = 1; order < 4; ++order)
      for (int k = 3; k >= order; --k) d[k] = (d[k] - d[k - 1]) / (node[k] - node[k - order]);
    double c[4] = {d[3], 0, 0, 0};
    for (int k = 2; k >= 0; --k) {
      for (int power = 3; power > 0; --power) c[power] = c[power - 1] - node[k] * c[power];
      c[0] = d[k] - node[k] * c[0];
    }
    for (int power = 0; power < 4; ++power) curve.at[i][power] = curve.c[power][i] = static_cast<float>(c[power]);
  }
  return curve;
}

}  // namespace

const ActivationCurve* activation_curve(int activation) {
  static const ActivationCurve curves[] = {fit(gelu, 2.5f), fit(gelu_tanh, 2.5f), fit(quick_gelu, 1.5f),
                                           fit(silu, 0.85f)};
  return activation < kGelu ? nullptr : &curves[activation - kGelu];
}

}  // namespace calmclip
