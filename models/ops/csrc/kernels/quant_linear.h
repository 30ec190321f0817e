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

// The AVX2 kernel multiplies by vpmaddubsw, which adds the products of two neighbouring bytes in 16 bits and saturates.
// The weights alone decide whether it can: such a sum is at most 255 times the positive weights and at least 255 times
// the negative ones, so neither may exceed kSafe in total. If those of two steps together do not, the sums of both are
// added in 16 bits, too: a couple. If a step's pairs exceed it, perhaps those of another form do not: which two of four
// bytes are neighbours is free. An order sorts the steps of eight columns of a panel accordingly; the panel stays as it
// is. It begins with three counts: couples of the first form, other couples, and single steps. The steps follow: those
// of couples, single steps, and those that must be multiplied in 16 bits. The two highest bits of a step in other
// couples and of a single step are its form. The order of a panel is four of these. If most steps of a panel must be
// multiplied in 16 bits, its first number is kUnordered, and the others are not read.
inline constexpr size_t kOrderColumns = 8, kForms = 3, kOrderCounts = 3, kFormShift = 14;
inline constexpr uint16_t kUnordered = 0xffff;
inline constexpr uint8_t kForm[kForms][4] = {{0, 1, 2, 3}, {1, 2, 3, 0}, {0, 2, 1, 3}};
inline constexpr int kSafe = 128;  // 255 * 128 < 2^15
inline constexpr size_t linear_order_numbers(size_t k) { return kPanel / kOrderColumns * (k / 4 + kOrderCounts); }
static_assert(kMostK / 4 <= 1 << kFormShift);

// `order`: count * linear_order_numbers(k) numbers, for `count` panels.
void order_linear(const int8_t* panels, size_t k, size_t count, uint16_t* order);

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
  // For each column (128 - x_zero) * the sum, modulo 2^32: `start` of kernels that multiply x - 128, a signed byte. Only
  // those of NEON and dotprod read it, because these have no product of bytes of mixed signs.
  const int32_t* signed_start;
  const uint16_t* order;  // of the panels, or null; only the AVX2 kernel reads it
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
  // The panel goes on with `steps` of each further line of x; only kernels whose file sets these two read them.
  const uint8_t* const* line = nullptr;
  size_t lines = 1;  // with that of x, which starts at or after line[0], and so do the others
  const uint16_t* order = nullptr;  // of the panel, or null; this and the next are for the AVX2 kernel alone
  size_t columns = kPanel;          // sums of the columns after them need not be computed
};

// The peak rate of byte products: rounds * kPeakMacs multiply-accumulates of uint8 and int8 in registers, in the widest
// instruction of the set. Returns a value that depends on the sums, so that no compiler removes them.
inline constexpr size_t kPeakMacs = 1536;
using Int8Peak = int32_t(size_t rounds);

}  // namespace calmclip
