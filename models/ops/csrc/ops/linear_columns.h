// Shared by the op wrappers of quant_linear and quant_conv: the numbers of each column.
#pragma once

#include <cmath>
#include <optional>

#include "../kernels/quant_linear.h"
#include "quantized.h"

namespace calmclip {

// The steps of x and of the weight, and the bias; inputs of a run or constants. x_scale is null if each row has its own.
struct Scaling {
  const Named& op;
  Ort::ConstValue x_scale, x_zero, weight_scale, bias;
};

constexpr size_t gated_panels(size_t answers) { return (2 * answers + kPanel - 1) / kPanel; }

// Where the column i of n lies in the panels of a gated layer.
constexpr size_t gated_place(size_t i, size_t n) {
  constexpr size_t kHalf = kPanel / 2;
  const size_t part = i / (n / 2), at = i % (n / 2);
  return at / kHalf * kPanel + part * kHalf + at % kHalf;
}

// Padded to whole panels; see LinearWork.
struct LinearColumns {
  // `sums`: of each column of the weight, padded; n columns.
  LinearColumns(const Scaling& of, const std::vector<int32_t>& sums, size_t n) : start(sums), signed_start(sums) {
    const float x_scale = of.x_scale ? Input<float>(of.op, of.x_scale, "x_scale").scale() : 1;
    around = Input<uint8_t>(of.op, of.x_zero, "x_zero").number();
    const Input<float> weight_scale(of.op, of.weight_scale, "weight_scale"), biases(of.op, of.bias, "bias");
    const bool scales = weight_scale.columns(n);
    weight_scale.check_scales();
    if (biases.shape.size() != 1 || biases.side(0) != n) biases.refuse("[" + std::to_string(n) + "]");
    bias.assign(biases.data, biases.data + n);
    const auto times = [](std::vector<int32_t>& numbers, uint32_t factor) {
      for (int32_t& number : numbers) number = static_cast<int32_t>(factor * static_cast<uint32_t>(number));
    };
    times(start, -uint32_t{around});
    times(signed_start, 128 - uint32_t{around});
    for (size_t i = 0; i < n; ++i) scale.push_back(weight_scale.data[scales ? i : 0] * x_scale);
    pad();
  }

  // The result is in `steps`. A number is a sum of `products`. With a `floor` (0, or 1 for the zero point of y), the
  // result is scaled once, if no number leaves the range of a conversion to int32.
  void quantize(const Steps& steps, size_t n, size_t products, std::optional<bool> at_zero) {
    inverse = each(steps.inverse, n);
    zero = each(steps.zero, n);
    if (at_zero) quantize_at_once(n, products, *at_zero);
    pad();
  }

  // The order of a gated layer: 16 columns of the first half, then those of the second half that they gate.
  void interleave(size_t n) {
    for (auto* numbers : {&scale, &bias}) {
      const std::vector<float> apart = *numbers;
      numbers->assign(start.size(), 0);
      for (size_t i = 0; i < n; ++i) (*numbers)[gated_place(i, n)] = apart[i];
    }
  }

  void fill(LinearWork& work) const {
    work.start = start.data();
    work.signed_start = signed_start.data();
    work.scale = scale.data();
    work.bias = bias.data();
    work.inverse = inverse.data();
    work.zero = zero.data();
    work.floor = floor.empty() ? nullptr : floor.data();
  }

  uint8_t around;  // x_zero

 private:
  void quantize_at_once(size_t n, size_t products, bool at_zero) {
    std::vector<float> scales, biases;
    for (size_t i = 0; i < n; ++i) {
      const double step = double{scale[i]} * inverse[i], middle = double{bias[i]} * inverse[i];
      if (!(255.0 * 128 * products * step + std::abs(middle) < 1 << 30)) return;
      scales.push_back(static_cast<float>(step));
      biases.push_back(static_cast<float>(middle));
    }
    scale = scales;
    bias = biases;
    for (const int32_t z : zero) floor.push_back(static_cast<uint8_t>(at_zero ? z : 0));
  }

  void pad() {
    for (auto* numbers : {&scale, &bias, &inverse}) numbers->resize(start.size());
    zero.resize(start.size());
    if (!floor.empty()) floor.resize(start.size());
  }

  // For each column: whether there are n numbers or one.
  template <class T>
  static std::vector<T> each(const std::vector<T>& numbers, size_t n) {
    return numbers.size() == n ? numbers : std::vector<T>(n, numbers[0]);
  }

  std::vector<int32_t> start, signed_start, zero;
  std::vector<float> scale, bias, inverse;
  std::vector<uint8_t> floor;
};

}  // namespace calmclip
