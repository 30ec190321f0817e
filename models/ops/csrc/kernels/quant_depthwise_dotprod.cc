#include "quant_depthwise.h"

#include <arm_neon.h>

#include "bytes_neon.h"

namespace calmclip {

extern "C" QuantDepthwise quant_depthwise_dotprod;

namespace {

#include "quant_depthwise_dots.inc"

struct Signed {
  using Sum = int32x4_t;
  static Sum from(int32x4_t x) { return x; }
  static int32x4_t total(Sum sum) { return sum; }
  static Sum hold(int32x4_t x) { return x; }
  static int32x4_t held(Sum sum) { return sum; }
  static uint8x16_t moved(uint8x16_t x) { return less_128(x); }
  static void dot(Sum& sum, uint8x16_t x, int8x16_t w) { sum = vdotq_s32(sum, vreinterpretq_s8_u8(x), w); }
};

}  // namespace

void quant_depthwise_dotprod(const DepthwiseWork& work, size_t first, size_t last) {
  signed_depthwise<Dots<Signed>>(work, first, last);
}

}  // namespace calmclip
