// Rows of floats into bytes: QuantLayerNorm, QuantRows and QuantPatches of models/ops/spec.py. A byte is clip(rint(x * inverse) +
// zero, 0, 255), half to even; inverse is 1 / scale. NaN gives an unspecified byte.
#pragma once

#include <cstddef>
#include <cstdint>

namespace calmclip {

// s = x + residual; normed = (s - mean) / sqrt(variance + epsilon) * weight + bias along each row;
// y = normed, quantized.
// Rows of width numbers, one after the other. tests/models/ops/test_quant_layer_norm.py declares the same layout.
struct NormRows {
  const float *x, *residual;  // residual: of x's size, or null; then `added` is added instead
  const float *weight, *bias;
  const float* inverse;  // width numbers each if `columns`, else one each
  const int32_t* zero;
  uint8_t* y;
  float *normed, *sum;  // or null
  size_t rows, width;   // width at least 1
  float added, epsilon;
  bool columns;
};

// `row`: scratch for width floats. In float32: first the mean, then the mean of the squared deviations.
using QuantLayerNorm = void(const NormRows& rows, float* row);

// Each row in steps of its own: z = x [/ sqrt(mean of x^2 + epsilon)] * weight; scale = max(max |z| / 127, kLeastStep);
// y = z / scale, rounded half to even, + 128. tests/models/ops/test_quant_rows.py declares the same layout.
struct ScaledRows {
  const float *x, *weight;  // weight: width numbers, or null for 1
  uint8_t* y;
  float* scale;        // one for each row
  size_t rows, width;  // width at least 1
  float epsilon;
  bool normalize;
};

inline constexpr float kLeastStep = 1e-30f;

using QuantRows = void(const ScaledRows& rows);

// Quantizes `count` pieces of `width` numbers, adjacent in x and `step` bytes apart in y.
using QuantPatches = void(const float* x, size_t width, size_t count, uint8_t* y, size_t step, float inverse,
                          int32_t zero);

// Copies windows of bytes, adjacent in y. A window is `width` bytes of every line, from the window's position on;
// positions are `stride` apart. Up to kPastLine bytes of a line after its last window may be read.
// tests/models/ops/test_quant_patches.py declares the same layout.
struct Windows {
  const uint8_t* const* line;
  size_t lines, width, stride, count;  // at least 1
  uint8_t* y;                          // count * lines * width
};

inline constexpr size_t kPastLine = 32;

using CutWindows = void(const Windows& windows);

}  // namespace calmclip
