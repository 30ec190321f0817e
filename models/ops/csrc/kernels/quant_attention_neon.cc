#include "quant_attention.h"

#include <arm_neon.h>

#include <cfloat>
#include <climits>
#include <cstring>

namespace calmclip {

extern "C" QuantAttention quant_attention_neon;

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 64")
#pragma GCC optimize("no-schedule-insns")  // see quant_depthwise_dots.inc
#endif

namespace {

#include "quant_attention_neon.inc"

// Without dot products of bytes: a product of bytes fits 16 bits, and other instructions add pairs of products in 32
// bits. The signs of the operands are those of quant_attention_dotprod.cc.
struct V : Lanes {
  static constexpr size_t kTile = 16;
  static constexpr int32_t kMiddle = 128;
  static I less(I count) { return vnegq_s32(vshlq_n_s32(count, 7)); }

  template <int lane, class Bytes>
  static Bytes word(Bytes k) {
    return reinterpret_cast<Bytes>(vdupq_laneq_s32(reinterpret_cast<I>(k), lane));
  }

  template <size_t n>
  static void dots(I (&sum)[n], const I* q, const K* k) {
    const int8x16_t x[4] = {vreinterpretq_s8_s32(q[0]), vreinterpretq_s8_s32(q[1]), vreinterpretq_s8_s32(q[2]),
                            vreinterpretq_s8_s32(q[3])};
    UNROLL for (size_t i = 0; i < n; ++i) {
      int8x16_t words = vld1q_s8(k + 64 * i);
      asm("" : "+w"(words) : : "memory");  // without it gcc 14 loads words apart, and far ahead
      I low, high;  // half of a lane's products each: of the first two lanes, and of the last two
      first(low, high, x[0], word<0>(words));
      more(low, high, x[1], word<1>(words));
      more(low, high, x[2], word<2>(words));
      more(low, high, x[3], word<3>(words));
      sum[i] = vaddq_s32(sum[i], vpaddq_s32(low, high));
    }
  }
  template <size_t n>
  static void row(I (&sum)[n], I p, const K* v) {
    const uint8x16_t x = vreinterpretq_u8_s32(p);
    UNROLL for (size_t i = 0; i < n; i += 4) {
      uint8x16_t groups = vreinterpretq_u8_s8(vld1q_s8(v + 4 * i));
      asm("" : "+w"(groups));
      unsigned_dot(sum[i], x, word<0>(groups));
      unsigned_dot(sum[i + 1], x, word<1>(groups));
      unsigned_dot(sum[i + 2], x, word<2>(groups));
      unsigned_dot(sum[i + 3], x, word<3>(groups));
    }
  }

  static void weave(const uint8_t* v, size_t step, size_t rows, size_t n, K* out) {
    Lanes::weave(v, step, rows, n, out, 0);
  }
  static void panel(const uint8_t* q, size_t step, size_t rows, size_t dims, I* out) {
    Lanes::panel(q, step, rows, dims, out, 0x80);
  }

 private:
  // Written out together: gcc moves products so far ahead of their additions that it stores them.
  static void first(I& low, I& high, int8x16_t x, int8x16_t k) {
    asm("smull %0.8h, %2.8b, %3.8b\n\tsmull2 %1.8h, %2.16b, %3.16b\n\tsaddlp %0.4s, %0.8h\n\tsaddlp %1.4s, %1.8h"
        : "=&w"(low), "=&w"(high)
        : "w"(x), "w"(k));
  }
  static void more(I& low, I& high, int8x16_t x, int8x16_t k) {
    I a, b;
    asm("smull %2.8h, %4.8b, %5.8b\n\tsmull2 %3.8h, %4.16b, %5.16b\n\tsadalp %0.4s, %2.8h\n\tsadalp %1.4s, %3.8h"
        : "+w"(low), "+w"(high), "=&w"(a), "=&w"(b)
        : "w"(x), "w"(k));
  }
  static void unsigned_dot(I& sum, uint8x16_t p, uint8x16_t v) {
    const uint32x4_t low = vpaddlq_u16(vmull_u8(vget_low_u8(p), vget_low_u8(v)));
    const uint32x4_t high = vpaddlq_u16(vmull_high_u8(p, v));
    sum = vaddq_s32(sum, vreinterpretq_s32_u32(vpaddq_u32(low, high)));
  }
};

#include "quant_attention_body.inc"

}  // namespace

void quant_attention_neon(const AttentionHead& head, void* scratch) { Head(head, scratch).rows(); }

}  // namespace calmclip
