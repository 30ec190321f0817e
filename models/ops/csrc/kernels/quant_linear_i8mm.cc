#include "quant_linear.h"

#include <arm_neon.h>

#include <cstring>

#include "activation_curve.h"
#include "quant_conv.h"

namespace calmclip {

extern "C" QuantLinear quant_linear_i8mm;
extern "C" QuantConv quant_conv_i8mm;
extern "C" QuantConvTiles quant_conv_tiles_i8mm;
extern "C" Int8Peak int8_peak_i8mm;

namespace {

#include "quant_linear_neon.inc"

// Products are those of matrices: two rows of x, eight bytes of each, by two columns of w. A tile is six rows of half a
// panel: 24 matrices of sums. In a panel four bytes of a column are adjacent, not eight, so two words of each column
// are interleaved first; "woven". If many rows read a panel, it is woven once, into a copy. A call with few rows weaves
// in the loop, or multiplies rows alone.

constexpr size_t kVectorsOfPanel = kPanel / 4, kHalf = kPanel / 2;
constexpr size_t kWord = 4 * kPanel;          // bytes of a panel in a step
constexpr size_t kMostWoven = 128 << 10;      // bytes of a copy, which lies on the stack
constexpr size_t kFewRows = 12;               // for which no panel is copied

// Written out: around the intrinsics gcc 14 moves sums from register to register within the loop.
template <int lane>
inline void dot(int32x4_t& sum, int8x16_t w, uint8x16_t x) {
  asm("sudot %0.4s, %1.16b, %2.4b[%3]" : "+w"(sum) : "w"(w), "w"(x), "i"(lane));
}
inline void multiply(int32x4_t& sum, uint8x16_t x, int8x16_t w) {
  asm("usmmla %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(x), "w"(w));
}

// Loads that move further up need more registers than there are.
inline void fence() { asm("" : : : "memory"); }

inline void prefetch(const int8_t* p) {
  __builtin_prefetch(p, 0, 2);
  __builtin_prefetch(p + 64, 0, 2);
}

inline uint8x16_t four(const uint8_t* x) {
  uint32_t bytes;
  std::memcpy(&bytes, x, sizeof bytes);
  return vreinterpretq_u8_u32(vsetq_lane_u32(bytes, vdupq_n_u32(0), 0));
}

// Rows alone.

template <size_t rows, int lane>
inline void step(int32x4_t (&sum)[rows][kVectorsOfPanel], const uint8x16_t (&x)[rows], const int8_t* w) {
#pragma GCC unroll 8
  for (size_t c = 0; c < kVectorsOfPanel; ++c) {
    if (c % 4 == 0) fence();
    const int8x16_t columns = vld1q_s8(w + 16 * c);
#pragma GCC unroll 3
    for (size_t r = 0; r < rows; ++r) dot<lane>(sum[r][c], columns, x[r]);
  }
}

template <size_t rows>
void rows_alone(const Product& p) {
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
    for (; left >= 4; left -= 4, w += 4 * kWord) {
      uint8x16_t x[rows];
#pragma GCC unroll 3
      for (size_t r = 0; r < rows; ++r) {
        x[r] = vld1q_u8(at[r]);
        at[r] += 16;
      }
#pragma GCC unroll 4
      for (size_t k = 0; k < 4; ++k, ahead += p.ahead_step) prefetch(ahead);
      step<rows, 0>(sum, x, w);
      step<rows, 1>(sum, x, w + kWord);
      step<rows, 2>(sum, x, w + 2 * kWord);
      step<rows, 3>(sum, x, w + 3 * kWord);
    }
#pragma GCC unroll 1
    for (; left; --left, w += kWord, ahead += p.ahead_step) {
      uint8x16_t x[rows];
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

// Rows in pairs.

// The first or last eight bytes of both.
inline int32x4_t low(int32x4_t a, int32x4_t b) {
  return vreinterpretq_s32_s64(vtrn1q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
}
inline int32x4_t high(int32x4_t a, int32x4_t b) {
  return vreinterpretq_s32_s64(vtrn2q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
}
inline int32x4_t words(const int8_t* w) { return vreinterpretq_s32_s8(vld1q_s8(w)); }

// Two steps of four columns, of which the second may be missing, as two matrices.
inline void weave(int32x4_t first, int32x4_t second, int8x16_t (&w)[2]) {
  w[0] = vreinterpretq_s8_s32(vzip1q_s32(first, second));
  w[1] = vreinterpretq_s8_s32(vzip2q_s32(first, second));
}

// `pairs` of steps of a panel, woven.
void weave(const int8_t* panel, size_t pairs, int8_t* to) {
  for (const int8_t* const end = panel + pairs * 2 * kWord; panel != end; panel += 2 * kWord, to += 2 * kWord)
#pragma GCC unroll 8
    for (size_t c = 0; c < kVectorsOfPanel; ++c) {
      int8x16_t w[2];
      weave(words(panel + 16 * c), words(panel + kWord + 16 * c), w);
      vst1q_s8(to + 32 * c, w[0]);
      vst1q_s8(to + 32 * c + 16, w[1]);
    }
}

// Two steps of half a panel by a pair of rows each. w: its first byte of that half. `one`: there is no second step.
template <bool woven, bool one, size_t pairs>
inline void multiply(int32x4_t (&sum)[pairs][kHalf / 2], const int32x4_t (&x)[pairs], const int8_t* w) {
#pragma GCC unroll 4
  for (size_t c = 0; c < kHalf / 4; ++c) {
    int8x16_t columns[2];
    if (woven) {
      columns[0] = vld1q_s8(w + 32 * c);
      columns[1] = vld1q_s8(w + 32 * c + 16);
    } else {
      weave(words(w + 16 * c), one ? vdupq_n_s32(0) : words(w + kWord + 16 * c), columns);
    }
#pragma GCC unroll 2
    for (size_t h = 0; h < 2; ++h)
#pragma GCC unroll 3
      for (size_t r = 0; r < pairs; ++r) multiply(sum[r][2 * c + h], vreinterpretq_u8_s32(x[r]), columns[h]);
    fence();
  }
}

// The columns of half a panel. An odd last row is its own neighbour; the sums of the row after it are overwritten.
template <size_t pairs, bool woven>
void half_of(size_t rows, const Product& p, size_t column) {
  int32x4_t sum[pairs][kHalf / 2];
  const size_t odd = rows % 2;
#pragma GCC unroll 3
  for (size_t r = 0; r < pairs; ++r)
#pragma GCC unroll 4
    for (size_t c = 0; c < kHalf / 4; ++c) {
      const int32_t* const from = p.from + 2 * r * p.from_stride + column + 4 * c;
      const int32x4_t a = vld1q_s32(from), b = vld1q_s32(from + (r + 1 == pairs && odd ? 0 : p.from_stride));
      sum[r][2 * c] = low(a, b);
      sum[r][2 * c + 1] = high(a, b);
    }
  const int8_t *w = p.panel + (woven ? 8 : 4) * column, *ahead = p.ahead;
  const uint8_t* line = p.x;
  const ptrdiff_t from = p.lines > 1 ? p.x - p.line[0] : 0;
  for (size_t i = 1;; ++i) {
    const uint8_t* at[2 * pairs];
#pragma GCC unroll 6
    for (size_t r = 0; r < 2 * pairs; ++r) at[r] = line + (r + 1 == 2 * pairs ? rows - 1 : r) * p.stride;
    size_t left = p.steps;
    for (; left >= 4; left -= 4, w += 4 * kWord) {
      // each row's bytes are loaded twice: those for the second pair of steps would need six more registers
      int32x4_t x[pairs];
      const auto load = [&](size_t r) { return vreinterpretq_s32_u8(vld1q_u8(at[r])); };
#pragma GCC unroll 2
      for (size_t k = 0; k < 2; ++k, ahead += 2 * p.ahead_step) prefetch(ahead);
#pragma GCC unroll 3
      for (size_t r = 0; r < pairs; ++r) x[r] = low(load(2 * r), load(2 * r + 1));
      multiply<woven, false>(sum, x, w);
#pragma GCC unroll 3
      for (size_t r = 0; r < pairs; ++r) {
        x[r] = high(load(2 * r), load(2 * r + 1));
        at[2 * r] += 16;
        at[2 * r + 1] += 16;
      }
      multiply<woven, false>(sum, x, w + 2 * kWord);
    }
    if (left >= 2) {
      int32x4_t x[pairs];
#pragma GCC unroll 3
      for (size_t r = 0; r < pairs; ++r) {
        x[r] = vreinterpretq_s32_u8(vcombine_u8(vld1_u8(at[2 * r]), vld1_u8(at[2 * r + 1])));
        at[2 * r] += 8;
        at[2 * r + 1] += 8;
      }
      multiply<woven, false>(sum, x, w);
      left -= 2;
      w += 2 * kWord;
    }
    if (!woven && left) {
      int32x4_t x[pairs];
#pragma GCC unroll 3
      for (size_t r = 0; r < pairs; ++r)
        x[r] = low(vreinterpretq_s32_u8(four(at[2 * r])), vreinterpretq_s32_u8(four(at[2 * r + 1])));
      multiply<false, true>(sum, x, w);
      w += kWord;
    }
    if (i == p.lines) break;
    line = p.line[i] + from;
  }
#pragma GCC unroll 3
  for (size_t r = 0; r < pairs; ++r)
#pragma GCC unroll 4
    for (size_t c = 0; c < kHalf / 4; ++c) {
      int32_t* const to = p.sums + 2 * r * kPanel + column + 4 * c;
      vst1q_s32(to, low(sum[r][2 * c], sum[r][2 * c + 1]));
      vst1q_s32(to + kPanel, high(sum[r][2 * c], sum[r][2 * c + 1]));
    }
}

template <bool woven>
void pairs_of(size_t rows, const Product& p) {
  using Half = void(size_t, const Product&, size_t);
  static constexpr Half* all[3] = {half_of<1, woven>, half_of<2, woven>, half_of<3, woven>};
  Half* const half = all[(rows - 1) / 2];
  half(rows, p, 0);
  half(rows, p, kHalf);
}

struct V : Lanes {
  static constexpr size_t kRows = 6;

  static void product(size_t rows, const Product& p) {
    rows > 3    ? pairs_of<false>(rows, p)
    : rows == 3 ? rows_alone<3>(p)
    : rows == 2 ? rows_alone<2>(p)
                : rows_alone<1>(p);
  }
};

#include "quant_linear_body.inc"
#include "quant_conv_body.inc"

using W = Shorts;
#include "quant_conv_tiles_body.inc"

void woven_linear(const LinearWork& work, size_t first, size_t last) {
  alignas(64) int8_t copy[kMostWoven];
  const int8_t* of = nullptr;  // the panel that was copied
  linear(work, first, last, [&](size_t rows, Product p) {
    const size_t odd = p.steps % 2, even = p.steps - odd;
    if (p.panel != of) weave(p.panel, even / 2, copy);
    of = p.panel;
    const Product rest{p.x + 4 * even, p.stride, of + kWord * even, 1, p.sums, kPanel, p.ahead, 0, p.sums};
    p.panel = copy;
    p.steps = even;
    pairs_of<true>(rows, p);
    if (odd) V::product(rows, rest);
  });
}

// One panel is woven at a time; all, if every tile reads all of them.
void woven_conv(const ConvWork& work, const ConvPart& part) {
  alignas(64) int8_t copy[kMostWoven];
  const size_t bytes = work.panel_bytes();
  const bool few = (part.last - part.first) * bytes <= kFewConvWeights;
  size_t first = 0, last = 0;  // the panels that were copied
  conv<12>(work, part, [&](const ConvWork&, const ConvTile& tile) {
    if (tile.panel < first || tile.panel >= last) {
      first = tile.panel;
      last = few ? part.last : first + 1;
      weave(work.of.panels + first * bytes, (last - first) * bytes / (2 * kWord), copy);
    }
    lines_tile(work, tile, copy + (tile.panel - first) * bytes, pairs_of<true>);
  });
}

void conv_tile(const ConvWork& work, const ConvTile& tile) {
  lines_tile(work, tile, work.of.panels + tile.panel * work.panel_bytes(), V::product);
}

}  // namespace

void quant_conv_i8mm(const ConvWork& work, const ConvPart& part) {
  const size_t places = (part.last_row - part.first_row) * work.out_width;
  const bool woven = places > kFewRows && work.steps() % 2 == 0 && work.panel_bytes() <= kMostWoven;
  woven ? woven_conv(work, part) : conv<12>(work, part, conv_tile);
}

void quant_conv_tiles_i8mm(const ConvWork& work, const ConvTilesPart& part) { conv_tiles(work, part); }

void quant_linear_i8mm(const LinearWork& work, size_t first, size_t last) {
  const bool woven = work.rows > kFewRows && linear_panel_bytes(work.k) <= kMostWoven;
  woven ? woven_linear(work, first, last) : linear(work, first, last);
}

int32_t int8_peak_i8mm(size_t rounds) {
  int32x4_t sum[24];
  uint8x16_t x = vdupq_n_u8(3);
  int8x16_t w = vdupq_n_s8(-5);
#pragma GCC unroll 24
  for (auto& s : sum) s = vdupq_n_s32(0);
  for (size_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 2
    for (size_t k = 0; k < 2; ++k) {
#pragma GCC unroll 24
      for (auto& s : sum) multiply(s, x, w);  // 2 x 24 x 32 products
    }
    asm("" : "+w"(x), "+w"(w));
  }
#pragma GCC unroll 24
  for (size_t k = 1; k < 24; ++k) sum[0] = veorq_s32(sum[0], sum[k]);
  return vgetq_lane_s32(sum[0], 0);
}

}  // namespace calmclip
