#include "quant_depthwise.h"

#include <arm_neon.h>

#include "bytes_neon.h"

namespace calmclip {

extern "C" QuantDepthwise quant_depthwise_i8mm;

namespace {

#include "quant_depthwise_dots.inc"

struct Mixed {  // the extension multiplies unsigned by signed bytes
  using Sum = int32x4_t;
  static Sum from(int32x4_t x) { return x; }
  static int32x4_t total(Sum sum) { return sum; }
  static Sum hold(int32x4_t x) { return x; }
  static int32x4_t held(Sum sum) { return sum; }
  static uint8x16_t moved(uint8x16_t x) { return x; }
  static void dot(Sum& sum, uint8x16_t x, int8x16_t w) { sum = vusdotq_s32(sum, x, w); }
};

}  // namespace

void quant_depthwise_i8mm(const DepthwiseWork& work, size_t first, size_t last) {
  depthwise<Dots<Mixed>, Dots<Mixed>>(work, first, last);
}

}  // namespace calmclip
