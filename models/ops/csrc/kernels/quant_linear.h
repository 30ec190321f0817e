// y = f((x - x_zero) w * x_scale * weight_scale + bias), quantized to uint8; or float32, with a residual added.
// x uint8 [rows, k], w int8 [k, n], y [rows, n], all row-major; k at most 65536.
//
// w is packed once: panels of 32 columns, in each four rows of w at a time, column by column: [n/32][k/4][32][4], filled
// up with 0. A panel is read from one end to the other, and a vector of it holds what one dot product of four bytes needs.
// Whoever works on a panel asks for the next one, so that weights which lie beyond the caches are there in time.
//
// Sums are exact in int32: 65536 * 255 * 128 < 2^31. Then float32: sum * scale + bias, two roundings; f; + residual, or
// * inverse, rounded half to even, + zero, cut to 0 .. 255. Where there is a `floor`, scale and bias are in steps of y, and
// it is sum * scale + bias, rounded once, rounded half to even, + zero, cut to floor .. 255.
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
  // Of each column, n rounded up to whole panels:
  const int32_t* start;  // -x_zero * the sum of the column of w, modulo 2^32
  const float* scale;    // x_scale * weight_scale [/ y_scale]
  const float* bias;
  const float* inverse;  // 1 / y_scale; this and `zero` are for bytes only
  const int32_t* zero;
  const uint8_t* floor;  // or null. With one there is no other activation; sum * scale + bias lies within +-2^30
  int32_t activation;    // a place in spec.ACTIVATIONS
  int32_t one_residual;  // whether the residual is
  const float* residual;  // one number, or [rows, n]; then it may be `values`. Not for bytes
  float* values;          // [rows, n]; null where `bytes` are wanted
  uint8_t* bytes;
};

// The columns of the panels [first, last), all rows.
using QuantLinear = void(const LinearWork& work, size_t first, size_t last);

// What a tile is made of, between a kernel and its loop: sums [rows, kPanel] = from + x panel, where x has 4 * steps
// columns, and rows of x and of `from` lie that far apart. For each step the 128 bytes at `ahead` are asked for, which
// moves on by ahead_step.
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
};

// How fast can products of bytes be? rounds * kPeakMacs multiply-accumulates of uint8 and int8 in registers, in the
// widest form of the instruction set; -> something of the sums, so that they are really made.
inline constexpr size_t kPeakMacs = 1536;
using Int8Peak = int32_t(size_t rounds);

}  // namespace calmclip
