#include "quant_lookup.h"

#include <arm_neon.h>

#include "bytes_neon.h"

namespace calmclip {

extern "C" QuantLookup quant_lookup_neon;

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 4")
#endif

// The table is in sixteen registers. One instruction looks up in four of them; it leaves the bytes whose index is 64 or
// more, and the next one finds these in its quarter of the table.
void quant_lookup_neon(const uint8_t* x, uint8_t* y, size_t count, const uint8_t* table) {
  const uint8x16x4_t a = vld1q_u8_x4(table), b = vld1q_u8_x4(table + 64);
  const uint8x16x4_t c = vld1q_u8_x4(table + 128), d = vld1q_u8_x4(table + 192);
  const uint8x16_t quarter = vdupq_n_u8(64);
  const auto look = [&](uint8x16_t v) {
    uint8x16_t result = vqtbl4q_u8(a, v);
    v = vsubq_u8(v, quarter);
    result = vqtbx4q_u8(result, b, v);
    v = vsubq_u8(v, quarter);
    result = vqtbx4q_u8(result, c, v);
    return vqtbx4q_u8(result, d, vsubq_u8(v, quarter));
  };
  size_t i = 0;
  for (; i + 64 <= count; i += 64) {
    uint8x16_t v[4];
    UNROLL for (size_t j = 0; j < 4; ++j) v[j] = look(vld1q_u8(x + i + 16 * j));
    UNROLL for (size_t j = 0; j < 4; ++j) vst1q_u8(y + i + 16 * j, v[j]);
  }
  for (; i + 16 <= count; i += 16) vst1q_u8(y + i, look(vld1q_u8(x + i)));
  if (const size_t rest = count - i) store_first(y + i, look(first_bytes(x + i, rest)), rest);
}

}  // namespace calmclip
