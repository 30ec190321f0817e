#include "quant_add.h"

#include <arm_neon.h>

#include "bytes_neon.h"

namespace calmclip {

extern "C" QuantAdd quant_add_neon;

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 4")
#endif

namespace {

constexpr size_t kColumns = 16;  // their constants stay in registers
constexpr size_t kRows = 16;     // so many of all columns, before the next rows: the cache keeps their lines

// Bytes are masked out of words and keep their position; the conversion to floats divides by 2^8 or 2^16.
template <size_t i>
float32x4_t number(uint32x4_t words) {
  if constexpr (i == 3) {
    return vcvtq_f32_u32(vshrq_n_u32(words, 24));
  } else {
    const uint32x4_t masked = vandq_u32(words, vdupq_n_u32(255u << 8 * i));
    if constexpr (i == 0)
      return vcvtq_f32_u32(masked);
    else
      return vcvtq_n_f32_u32(masked, 8 * i);
  }
}

// The constants of sixteen columns.
struct Columns {
  float32x4_t a_factor[4], b_factor[4], start[4];
  int16x8_t zero[2];  // of every fourth column, one after the other, as `add` narrows the words

  Columns(const AddBlock& block, size_t column) {
    int32x4_t zeros[4];
    UNROLL for (size_t i = 0; i < 4; ++i) {
      const size_t at = i * (kAddBlock / 4) + column / 4;
      a_factor[i] = vld1q_f32(block.a_factor + at);
      b_factor[i] = vld1q_f32(block.b_factor + at);
      start[i] = vld1q_f32(block.start + at);
      zeros[i] = vld1q_s32(block.zero + at);
    }
    zero[0] = vqmovn_high_s32(vqmovn_s32(zeros[0]), zeros[1]);
    zero[1] = vqmovn_high_s32(vqmovn_s32(zeros[2]), zeros[3]);
  }

  template <size_t i>
  int32x4_t sum(uint32x4_t a, uint32x4_t b) const {
    const float32x4_t b_part = vfmaq_f32(start[i], number<i>(b), b_factor[i]);
    return vcvtnq_s32_f32(vfmaq_f32(b_part, number<i>(a), a_factor[i]));
  }

  uint8x16_t add(uint8x16_t a_bytes, uint8x16_t b_bytes) const {
    const uint32x4_t a = vreinterpretq_u32_u8(a_bytes), b = vreinterpretq_u32_u8(b_bytes);
    const int16x8_t first = vqmovn_high_s32(vqmovn_s32(sum<0>(a, b)), sum<1>(a, b));
    const int16x8_t last = vqmovn_high_s32(vqmovn_s32(sum<2>(a, b)), sum<3>(a, b));
    const uint8x16_t apart = vqmovun_high_s16(vqmovun_s16(vqaddq_s16(first, zero[0])), vqaddq_s16(last, zero[1]));
    const uint8x16_t order = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    return vqtbl1q_u8(apart, order);
  }
};

void add(const AddBlock block) {  // by value: no store through a pointer may change it
  for (size_t first = 0; first < block.rows; first += kRows) {
    const size_t rows = block.rows - first < kRows ? block.rows - first : kRows;
    for (size_t column = 0; column < block.width; column += kColumns) {
      const Columns columns(block, column);
      const size_t at = first * block.step + column, left = block.width - column;
      const uint8_t *a = block.a + at, *b = block.b + at;
      uint8_t* y = block.y + at;
      if (left >= kColumns) {
        for (size_t row = 0; row < rows; ++row, a += block.step, b += block.step, y += block.step)
          vst1q_u8(y, columns.add(vld1q_u8(a), vld1q_u8(b)));
      } else {
        for (size_t row = 0; row < rows; ++row, a += block.step, b += block.step, y += block.step)
          store_first(y, columns.add(first_bytes(a, left), first_bytes(b, left)), left);
      }
    }
  }
}

}  // namespace

void quant_add_neon(const AddBlock& block) { add(block); }

}  // namespace calmclip
