// y = f((x - x_zero) w * x_scale * weight_scale + bias), quantized to uint8; or as float32 with a residual added.
// With a scale of x for each row, float32 alone; then also gated: y = f(a) b + residual, where a and b are two such
// products, and a panel has 16 columns of a and the same 16 of b.
// x uint8 [rows, k], w int8 [k, n], y [rows, n], all row-major; k at most 65536.
//
// w is packed once into panels of 32 columns. Within a panel four rows of w at a time are stored column by column:
// [n/32][k/4][32][4], padded with 0. A panel is read from start to end, and each vector of it holds the operands of dot
// products of four bytes. A kernel prefetches the next panel while it computes one, so that weights beyond the caches
// arrive in time.
//
// Sums are exact in int32: 65536 * 255 * 128 < 2^31. Then the epilogue in float32: sum * scale + bias, two roundings;
// f; + residual, or * inverse, rounded half to even, + zero, clipped to 0 .. 255. With a `floor`, scale and bias are in
// steps of y, and the epilogue is sum * scale + bias, rounded once, rounded half to even, + zero, clipped to floor ..
// 255.
#pragma once

#include <cstddef>
#include <cstdint>

namespace calmclip {

inline constexpr size_t kPanel = 32;       // columns
inline constexpr size_t kMostK = 65536;

inline constexpr size_t linear_panels(size_t n) { return (n + kPanel - 1) / kPanel; }
inline constexpr size_t linear_panel_bytes(size_t k) { return (k + 3) / 4 * 4 * kPanel; }

// w [k, n] -> `panels`, linear_panels(n) * linear_panel_bytes(k) bytes, and the sum of each column, linear_panels(n) *
// kPanel numbers.
void pack_linear(const int8_t* w, size_t k, size_t n, int8_t* panels, int32_t* sums);

struct LinearWork {
  const uint8_t* x;
  size_t rows, k, n;
  const int8_t* panels;
  // For each column, n rounded up to whole panels:
  const int32_t* start;  // -x_zero * the sum of the column of w, modulo 2^32
  const float* scale;    // x_scale * weight_scale [/ y_scale]
  const float* bias;
  const float* inverse;  // 1 / y_scale; this and `zero` are used for bytes only
  const int32_t* zero;
  const uint8_t* floor;  // or null. If not, `activation` is not read, and sum * scale + bias is within +-2^30
  int32_t activation;    // an index into spec.ACTIVATIONS
  int32_t one_residual;  // whether the residual is one number
  const float* residual;  // one number, or [rows, n], and then it may be `values`. Not for bytes
  float* values;          // [rows, n]; null if the result is `bytes`
  uint8_t* bytes;
  const float* row_scale;  // or null: x_scale of each row. If not, `scale` is that of the weight alone
  int32_t gated;           // with row_scale: n and y count the columns of a alone
};

// Computes the columns of the panels [first, last), all rows.
using QuantLinear = void(const LinearWork& work, size_t first, size_t last);

// A tile's operands, between a kernel and its inner loop: sums [rows, kPanel] = from + x panel, where x has 4 * steps
// columns. Rows of x and of `from` have the strides below. Each step prefetches the 128 bytes at `ahead`, which then
// advances by ahead_step.
struct Product {
  const uint8_t* x;
  size_t stride;
  const int8_t* panel;
  size_t steps;
  const int32_t* from;
  size_t from_stride;
  const int8_t* ahead;
  size_t ahead_step;
  int32_t* sums;
  // The panel goes on with `steps` of each further line of x; only the VNNI kernels read these two.
  const uint8_t* const* line = nullptr;
  size_t lines = 1;  // with x, which is line[0]
};

// The peak rate of byte products: rounds * kPeakMacs multiply-accumulates of uint8 and int8 in registers, in the widest
// instruction of the set. Returns a value that depends on the sums, so that no compiler removes them.
inline constexpr size_t kPeakMacs = 1536;
using Int8Peak = int32_t(size_t rounds);

}  // namespace calmclip
