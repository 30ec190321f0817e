// Rows of floats into bytes: QuantLayerNorm and QuantPatches of models/ops/spec.py. clip(rint(x * inverse) + zero, 0,
// 255), half to even; inverse is 1 / scale. NaN gives some byte.
#pragma once

#include <cstddef>
#include <cstdint>

namespace calmclip {

// s = x + residual; normed = (s - mean) / sqrt(variance + epsilon) * weight + bias along each row;
// y = normed, quantized.
// Rows of width numbers, one after the other. tests/models/ops/test_quant_layer_norm.py lays it out the same.
struct NormRows {
  const float *x, *residual;  // residual: of x's size, or null, and then `added` is added
  const float *weight, *bias;
  const float* inverse;  // width numbers each, or one each: `columns`
  const int32_t* zero;
  uint8_t* y;
  float *normed, *sum;  // or null
  size_t rows, width;   // width at least 1
  float added, epsilon;
  bool columns;
};

// `row`: room for width floats. The mean first, then the mean of squares of what is left, in float32.
using QuantLayerNorm = void(const NormRows& rows, float* row);

// `count` pieces of `width` numbers, one after the other in x, each to `step` bytes behind the one before it in y.
using QuantPatches = void(const float* x, size_t width, size_t count, uint8_t* y, size_t step, float inverse,
                          int32_t zero);

// Windows of bytes, one after the other in y: of each the `width` bytes of every line from its place on. Places are
// `stride` apart. Of a line kPastLine bytes behind the last window's may be read.
// tests/models/ops/test_quant_patches.py lays it out the same.
struct Windows {
  const uint8_t* const* line;
  size_t lines, width, stride, count;  // at least 1
  uint8_t* y;                          // count * lines * width
};

inline constexpr size_t kPastLine = 32;

using CutWindows = void(const Windows& windows);

}  // namespace calmclip
