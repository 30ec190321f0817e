#include "quant_linear.h"

#include <arm_neon.h>

#include <cstring>

#include "activation_curve.h"
#include "quant_conv.h"

namespace calmclip {

extern "C" QuantLinear quant_linear_dotprod;
extern "C" QuantConv quant_conv_dotprod;
extern "C" QuantConvTiles quant_conv_tiles_dotprod;
extern "C" Int8Peak int8_peak_dotprod;

namespace {

#include "quant_linear_neon.inc"

// Bytes of x become signed by a flip of their highest bit. So 24 sums, three rows of x and the columns' weights fit the
// 32 registers, and of 99 vector instructions for 16 numbers of each row 96 multiply. A lower and wider tile flips less
// than a higher and narrower one.
constexpr size_t kVectorsOfPanel = kPanel / 4;

inline int8x16_t flipped(uint8x16_t x) { return vreinterpretq_s8_u8(veorq_u8(x, vdupq_n_u8(0x80))); }

inline int8x16_t four(const uint8_t* x) {
  uint32_t bytes;
  std::memcpy(&bytes, x, sizeof bytes);
  return flipped(vreinterpretq_u8_u32(vdupq_n_u32(bytes)));
}

inline void prefetch(const int8_t* p) {
  __builtin_prefetch(p, 0, 2);
  __builtin_prefetch(p + 64, 0, 2);
}

// Written out: around the intrinsic gcc 14 moves sums from register to register within the loop.
template <int lane>
inline void dot(int32x4_t& sum, int8x16_t w, int8x16_t x) {
  asm("sdot %0.4s, %1.16b, %2.4b[%3]" : "+w"(sum) : "w"(w), "w"(x), "i"(lane));
}

// One step of a tile: the word `lane` of each row's bytes by the columns of w.
template <size_t rows, int lane>
inline void step(int32x4_t (&sum)[rows][kVectorsOfPanel], const int8x16_t (&x)[rows], const int8_t* w) {
#pragma GCC unroll 8
  for (size_t c = 0; c < kVectorsOfPanel; ++c) {
    if (c % 4 == 0) asm("" : : : "memory");  // loads that move further up need more registers than there are
    const int8x16_t columns = vld1q_s8(w + 16 * c);
#pragma GCC unroll 3
    for (size_t r = 0; r < rows; ++r) dot<lane>(sum[r][c], columns, x[r]);
  }
}

template <size_t rows>
void product_of(const Product& p) {
  int32x4_t sum[rows][kVectorsOfPanel];
#pragma GCC unroll 3
  for (size_t r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (size_t c = 0; c < kVectorsOfPanel; ++c) sum[r][c] = vld1q_s32(p.from + r * p.from_stride + 4 * c);
  const int8_t *w = p.panel, *ahead = p.ahead;
  const uint8_t* line = p.x;
  const ptrdiff_t from = p.lines > 1 ? p.x - p.line[0] : 0;
  for (size_t i = 1;; ++i) {
    const uint8_t* at[rows];
#pragma GCC unroll 3
    for (size_t r = 0; r < rows; ++r) at[r] = line + r * p.stride;
    size_t left = p.steps;
    for (; left >= 4; left -= 4, w += 16 * kPanel) {
      int8x16_t x[rows];
#pragma GCC unroll 3
      for (size_t r = 0; r < rows; ++r) {
        x[r] = flipped(vld1q_u8(at[r]));
        at[r] += 16;
      }
#pragma GCC unroll 4
      for (size_t k = 0; k < 4; ++k, ahead += p.ahead_step) prefetch(ahead);
      step<rows, 0>(sum, x, w);
      step<rows, 1>(sum, x, w + 4 * kPanel);
      step<rows, 2>(sum, x, w + 8 * kPanel);
      step<rows, 3>(sum, x, w + 12 * kPanel);
    }
#pragma GCC unroll 1
    for (; left; --left, w += 4 * kPanel, ahead += p.ahead_step) {
      int8x16_t x[rows];
#pragma GCC unroll 3
      for (size_t r = 0; r < rows; ++r) {
        x[r] = four(at[r]);
        at[r] += 4;
      }
      prefetch(ahead);
      step<rows, 0>(sum, x, w);
    }
    if (i == p.lines) break;
    line = p.line[i] + from;
  }
#pragma GCC unroll 3
  for (size_t r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (size_t c = 0; c < kVectorsOfPanel; ++c) vst1q_s32(p.sums + r * kPanel + 4 * c, sum[r][c]);
}

struct V : Lanes {
  static constexpr size_t kRows = 3;
  static constexpr bool kSigned = true;

  static void product(size_t rows, const Product& p) {
    rows == 1 ? product_of<1>(p) : rows == 2 ? product_of<2>(p) : product_of<3>(p);
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

void quant_conv_dotprod(const ConvWork& work, const ConvPart& part) { conv<12>(work, part, conv_tile); }

void quant_conv_tiles_dotprod(const ConvWork& work, const ConvTilesPart& part) { conv_tiles(work, part); }

void quant_linear_dotprod(const LinearWork& work, size_t first, size_t last) { linear(work, first, last); }

int32_t int8_peak_dotprod(size_t rounds) {
  int32x4_t sum[24];
  int8x16_t x = vdupq_n_s8(3), w = vdupq_n_s8(-5);
#pragma GCC unroll 24
  for (auto& s : sum) s = vdupq_n_s32(0);
  for (size_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 4
    for (size_t k = 0; k < 4; ++k) {
#pragma GCC unroll 24
      for (auto& s : sum) dot<0>(s, w, x);  // 4 x 24 x 16 products
    }
    asm("" : "+w"(x), "+w"(w));
  }
#pragma GCC unroll 24
  for (size_t k = 1; k < 24; ++k) sum[0] = veorq_s32(sum[0], sum[k]);
  return vgetq_lane_s32(sum[0], 0);
}

}  // namespace calmclip
