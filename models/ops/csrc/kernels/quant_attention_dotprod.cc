#include "quant_attention.h"

#include <arm_neon.h>

#include <cfloat>
#include <climits>
#include <cstring>

namespace calmclip {

extern "C" QuantAttention quant_attention_dotprod;

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 64")
#endif

namespace {

#include "quant_attention_neon.inc"

// Products have operands of one sign. q - 128 is signed, as k - 128 is. p stays unsigned, and so does v, because p may
// end anywhere: 128 times the sum of p is subtracted at the start.
struct V : Lanes {
  static constexpr int32_t kMiddle = 128;
  static I less(I count) { return vnegq_s32(vshlq_n_s32(count, 7)); }

  // Written out: around the intrinsics gcc 14 moves sums from register to register within the loop.
  template <int lane>
  static void dot(I& sum, I x, int8x16_t k) {
    asm("sdot %0.4s, %1.16b, %2.4b[%3]" : "+w"(sum) : "w"(x), "w"(k), "i"(lane));
  }
  template <int lane>
  static void unsigned_dot(I& sum, I p, int8x16_t v) {
    asm("udot %0.4s, %1.16b, %2.4b[%3]" : "+w"(sum) : "w"(p), "w"(v), "i"(lane));
  }
  template <size_t n>
  static void dots(I (&sum)[n], const I* q, const K* k) {
    const I x[4] = {q[0], q[1], q[2], q[3]};
    UNROLL for (size_t i = 0; i < n; ++i) {
      if (i % 4 == 0) asm("" : : : "memory");  // loads that move further up need more registers than there are
      const int8x16_t words = vld1q_s8(k + 64 * i);
      dot<0>(sum[i], x[0], words);
      dot<1>(sum[i], x[1], words);
      dot<2>(sum[i], x[2], words);
      dot<3>(sum[i], x[3], words);
    }
  }
  template <size_t n>
  static void row(I (&sum)[n], I p, const K* v) {
    UNROLL for (size_t i = 0; i < n; i += 4) {
      const int8x16_t groups = vld1q_s8(v + 4 * i);
      unsigned_dot<0>(sum[i], p, groups);
      unsigned_dot<1>(sum[i + 1], p, groups);
      unsigned_dot<2>(sum[i + 2], p, groups);
      unsigned_dot<3>(sum[i + 3], p, groups);
    }
  }

  static void weave(const uint8_t* v, size_t step, size_t rows, size_t n, K* out) {
    Lanes::weave(v, step, rows, n, out, 0);
  }
  static void panel(const uint8_t* q, size_t step, size_t rows, size_t dims, I* out) {
    Lanes::panel(q, step, rows, dims, out, 0x80);
  }
};

#include "quant_attention_body.inc"

}  // namespace

void quant_attention_dotprod(const AttentionHead& head, void* scratch) { Head(head, scratch).rows(); }

}  // namespace calmclip
