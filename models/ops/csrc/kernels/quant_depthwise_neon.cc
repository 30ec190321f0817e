#include "quant_depthwise.h"

#include <arm_neon.h>

#include "bytes_neon.h"

namespace calmclip {

extern "C" QuantDepthwise quant_depthwise_neon;

namespace {

#include "quant_depthwise_dots.inc"

// Two registers: the first two channels, and the last two. Half of a channel's four products are in one lane each.
struct Pairs {
  int32x4_t low, high;
};

// Products of bytes fit 16 bits; another instruction adds pairs of them to sums in 32 bits.
struct Widened {
  using Sum = Pairs;
  static Sum from(int32x4_t x) {
    return {vzip1q_s32(x, vdupq_n_s32(0)), vzip2q_s32(x, vdupq_n_s32(0))};
  }
  static int32x4_t total(Sum sum) { return vpaddq_s32(sum.low, sum.high); }
  static Sum hold(int32x4_t x) { return {x, x}; }
  static int32x4_t held(Sum sum) { return sum.low; }
  static uint8x16_t moved(uint8x16_t x) { return less_128(x); }
  // Not intrinsics: gcc 14 keeps more of the products in registers this way.
  static void dot(Sum& sum, uint8x16_t x, int8x16_t w) {
    int16x8_t low, high;
    asm("smull %2.8h, %4.8b, %5.8b\n\tsmull2 %3.8h, %4.16b, %5.16b\n\tsadalp %0.4s, %2.8h\n\tsadalp %1.4s, %3.8h"
        : "+w"(sum.low), "+w"(sum.high), "=&w"(low), "=&w"(high)
        : "w"(x), "w"(w));
  }
};

}  // namespace

void quant_depthwise_neon(const DepthwiseWork& work, size_t first, size_t last) {
  signed_depthwise<Dots<Widened>>(work, first, last);
}

}  // namespace calmclip
