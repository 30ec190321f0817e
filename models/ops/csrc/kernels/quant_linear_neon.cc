#include "quant_linear.h"

#include <arm_neon.h>

#include <cstring>

#include "activation_curve.h"
#include "quant_conv.h"

namespace calmclip {

extern "C" QuantLinear quant_linear_neon;
extern "C" QuantConv quant_conv_neon;
extern "C" QuantConvTiles quant_conv_tiles_neon;
extern "C" Int8Peak int8_peak_neon;

// See quant_depthwise_dots.inc.
#if !defined(__clang__)
#pragma GCC optimize("no-schedule-insns")
#endif

namespace {

#include "quant_linear_neon.inc"

// For processors without dot products of bytes, such as the Cortex-A72. Bytes of x become signed by a flip of their
// highest bit. A product of bytes fits 16 bits, and another instruction adds pairs of products in 32 bits. These sums
// take two registers for four columns. A tile is two rows of half a panel: 16 registers of sums. With three rows there
// is no room for the bytes of x, and a row takes more instructions. Two products in 16 bits would save additions, but
// multiplications have one unit there.
constexpr size_t kHalf = kPanel / 2, kVectorsOfHalf = kHalf / 4;

struct Pairs {
  int32x4_t low, high;  // of the first two columns, and of the last two: half of a column's products in a lane each
};

// One instruction each, written out together: gcc moves products so far ahead of their additions that it stores them.
inline void dot(Pairs& sum, int8x16_t w, int8x16_t x) {
  int16x8_t low, high;
  asm("smull %2.8h, %4.8b, %5.8b\n\tsmull2 %3.8h, %4.16b, %5.16b\n\tsadalp %0.4s, %2.8h\n\tsadalp %1.4s, %3.8h"
      : "+w"(sum.low), "+w"(sum.high), "=&w"(low), "=&w"(high)
      : "w"(w), "w"(x));
}

inline int8x16_t flipped(uint8x16_t x) { return vreinterpretq_s8_u8(veorq_u8(x, vdupq_n_u8(0x80))); }

inline int8x16_t four(const uint8_t* x) {
  uint32_t bytes;
  std::memcpy(&bytes, x, sizeof bytes);
  return flipped(vreinterpretq_u8_u32(vdupq_n_u32(bytes)));
}

template <int lane>
inline int8x16_t word(int8x16_t x) {
  return vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(x), lane));
}

template <size_t rows>
inline void step(Pairs (&sum)[rows][kVectorsOfHalf], const int8x16_t (&x)[rows], const int8_t* w) {
#pragma GCC unroll 4
  for (size_t c = 0; c < kVectorsOfHalf; ++c) {
    const int8x16_t columns = vld1q_s8(w + 16 * c);
#pragma GCC unroll 2
    for (size_t r = 0; r < rows; ++r) dot(sum[r][c], columns, x[r]);
  }
}

template <size_t rows, int lane>
inline void step_of(Pairs (&sum)[rows][kVectorsOfHalf], const int8x16_t (&x)[rows], const int8_t* w) {
  int8x16_t words[rows];
#pragma GCC unroll 2
  for (size_t r = 0; r < rows; ++r) words[r] = word<lane>(x[r]);
  step<rows>(sum, words, w + lane * 4 * kPanel);
}

// The sums of half a panel's columns from `column` on.
template <size_t rows>
void half_of(const Product& p, size_t column) {
  Pairs sum[rows][kVectorsOfHalf];
#pragma GCC unroll 2
  for (auto& row : sum)
#pragma GCC unroll 4
    for (auto& pairs : row) pairs.low = pairs.high = vdupq_n_s32(0);
  const int8_t *w = p.panel + 4 * column, *ahead = p.ahead + 4 * column;  // a half prefetches half
  const uint8_t* line = p.x;
  const ptrdiff_t from = p.lines > 1 ? p.x - p.line[0] : 0;
  for (size_t i = 1;; ++i) {
    const uint8_t* at[rows];
#pragma GCC unroll 2
    for (size_t r = 0; r < rows; ++r) at[r] = line + r * p.stride;
    size_t left = p.steps;
    for (; left >= 4; left -= 4, w += 16 * kPanel) {
      int8x16_t x[rows];
#pragma GCC unroll 2
      for (size_t r = 0; r < rows; ++r) {
        x[r] = flipped(vld1q_u8(at[r]));
        at[r] += 16;
      }
#pragma GCC unroll 4
      for (size_t k = 0; k < 4; ++k, ahead += p.ahead_step) __builtin_prefetch(ahead, 0, 2);
      step_of<rows, 0>(sum, x, w);
      step_of<rows, 1>(sum, x, w);
      step_of<rows, 2>(sum, x, w);
      step_of<rows, 3>(sum, x, w);
    }
#pragma GCC unroll 1
    for (; left; --left, w += 4 * kPanel, ahead += p.ahead_step) {
      int8x16_t x[rows];
#pragma GCC unroll 2
      for (size_t r = 0; r < rows; ++r) {
        x[r] = four(at[r]);
        at[r] += 4;
      }
      __builtin_prefetch(ahead, 0, 2);
      step<rows>(sum, x, w);
    }
    if (i == p.lines) break;
    line = p.line[i] + from;
  }
#pragma GCC unroll 2
  for (size_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (size_t c = 0; c < kVectorsOfHalf; ++c) {
      const int32x4_t start = vld1q_s32(p.from + r * p.from_stride + column + 4 * c);
      vst1q_s32(p.sums + r * kPanel + column + 4 * c, vaddq_s32(start, vpaddq_s32(sum[r][c].low, sum[r][c].high)));
    }
}

struct V : Lanes {
  static constexpr size_t kRows = 2;
  static constexpr bool kSigned = true;

  static void product(size_t rows, const Product& p) {
    for (size_t column = 0; column < kPanel; column += kHalf)
      rows == 1 ? half_of<1>(p, column) : half_of<2>(p, column);
  }
};

#include "quant_linear_body.inc"
#include "quant_conv_body.inc"

using W = Shorts;
#include "quant_conv_tiles_body.inc"

void conv_tile(const ConvWork& work, const ConvTile& tile) {
  lines_tile(work, tile, work.of.panels + tile.panel * work.panel_bytes(), V::product);
}

}  // namespace

void quant_conv_neon(const ConvWork& work, const ConvPart& part) { conv<12>(work, part, conv_tile); }

void quant_conv_tiles_neon(const ConvWork& work, const ConvTilesPart& part) { conv_tiles(work, part); }

void quant_linear_neon(const LinearWork& work, size_t first, size_t last) { linear(work, first, last); }

int32_t int8_peak_neon(size_t rounds) {
  Pairs sum[12];
  int8x16_t x = vdupq_n_s8(3), w = vdupq_n_s8(-5);
#pragma GCC unroll 12
  for (auto& s : sum) s.low = s.high = vdupq_n_s32(0);
  for (size_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 8
    for (size_t k = 0; k < 8; ++k) {
#pragma GCC unroll 12
      for (auto& s : sum) dot(s, w, x);  // 8 x 12 x 16 products
    }
    asm("" : "+w"(x), "+w"(w));
  }
#pragma GCC unroll 12
  for (size_t k = 1; k < 12; ++k) {
    sum[0].low = veorq_s32(sum[0].low, sum[k].low);
    sum[0].high = veorq_s32(sum[0].high, sum[k].high);
  }
  return vgetq_lane_s32(veorq_s32(sum[0].low, sum[0].high), 0);
}

}  // namespace calmclip
