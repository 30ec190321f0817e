#include "quant_attention.h"

#include <arm_neon.h>

#include <cfloat>
#include <climits>
#include <cstring>

namespace calmclip {

extern "C" QuantAttention quant_attention_i8mm;

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 64")
#endif

namespace {

#include "quant_attention_neon.inc"

// i8mm also has dot products of bytes of mixed signs.
struct V : Lanes {
  // Written out: around the intrinsic gcc 14 moves sums from register to register within the loop.
  template <int lane>
  static void dot(I& sum, I x, int8x16_t k) {
    asm("usdot %0.4s, %1.16b, %2.4b[%3]" : "+w"(sum) : "w"(x), "w"(k), "i"(lane));
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
      dot<0>(sum[i], p, groups);
      dot<1>(sum[i + 1], p, groups);
      dot<2>(sum[i + 2], p, groups);
      dot<3>(sum[i + 3], p, groups);
    }
  }

  static void weave(const uint8_t* v, size_t step, size_t rows, size_t n, K* out) {
    Lanes::weave(v, step, rows, n, out, 0x80);
  }
  static void panel(const uint8_t* q, size_t step, size_t rows, size_t dims, I* out) {
    Lanes::panel(q, step, rows, dims, out, 0);
  }
};

#include "quant_attention_body.inc"

}  // namespace

void quant_attention_i8mm(const AttentionHead& head, void* scratch) { Head(head, scratch).rows(); }

}  // namespace calmclip
