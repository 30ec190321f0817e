#include "resize.h"

#include <arm_neon.h>

namespace calmclip {

extern "C" ResizeRows resize_rows_neon;
extern "C" ResizeColumns resize_columns_neon;

// Sums of hi and lo over the taps -> 16-bit values; the conversion to bytes clips them.
static int16x4_t finish(int32x4_t hi, int32x4_t lo) {
  return vqmovn_s32(vshrq_n_s32(vaddq_s32(vshlq_n_s32(hi, 16), lo), kWeightBits));
}

void resize_rows_neon(const uint8_t* const* rows, const uint8_t* const*, size_t pixel_stride, size_t base,
                      size_t width, const Taps* taps, size_t columns, int16_t* scratch, uint8_t* quads,
                      size_t quad_stride) {
  static const size_t kRow[4] = {0, 2, 1, 3};  // the rows in the order of their bytes in a quad
  const size_t plane = (columns + kQuadColumns - 1) / kQuadColumns * kQuadColumns * 4;
  for (size_t part = 0; part < 2; ++part, rows += 8, quads += 2 * quad_stride) {
    // scratch: [pixel][channel][8 rows: two quads]
    const size_t even = (width + 1) / 2 * 2;
    for (size_t x = 0; x < even; ++x)
      for (size_t r = 0; r < 8; ++r) {
        const uint8_t* pixel = rows[r / 4 * 4 + kRow[r % 4]] + (x < width ? x : width - 1) * pixel_stride;
        for (size_t c = 0; c < 3; ++c) scratch[(x * 3 + c) * 8 + r] = pixel[c];
      }
    const int32x4_t half = vdupq_n_s32(1 << (kWeightBits - 1));
    for (size_t i = 0; i < columns; ++i) {
      const int16_t* pixel = scratch + (taps[i].first - base) * 24;
      const int16_t* weight = taps[i].weights;
      int32x4_t hi[3][2], lo[3][2];
      for (int c = 0; c < 3; ++c)
        for (int k = 0; k < 2; ++k) hi[c][k] = vdupq_n_s32(0), lo[c][k] = half;
      for (size_t p = 0; p < taps[i].pairs; ++p, weight += 4) {
        for (size_t t = 0; t < 2; ++t, pixel += 24) {
          for (int c = 0; c < 3; ++c) {
            const int16x8_t x = vld1q_s16(pixel + c * 8);
            hi[c][0] = vmlal_n_s16(hi[c][0], vget_low_s16(x), weight[t]);
            hi[c][1] = vmlal_n_s16(hi[c][1], vget_high_s16(x), weight[t]);
            lo[c][0] = vmlal_n_s16(lo[c][0], vget_low_s16(x), weight[t + 2]);
            lo[c][1] = vmlal_n_s16(lo[c][1], vget_high_s16(x), weight[t + 2]);
          }
        }
      }
      for (size_t c = 0; c < 3; ++c) {
        uint8_t both[8];
        vst1_u8(both, vqmovun_s16(vcombine_s16(finish(hi[c][0], lo[c][0]), finish(hi[c][1], lo[c][1]))));
        __builtin_memcpy(quads + c * plane + i * 4, both, 4);
        __builtin_memcpy(quads + quad_stride + c * plane + i * 4, both + 4, 4);
      }
    }
  }
}

void resize_columns_neon(const uint8_t* quads, size_t quad_stride, const Taps* taps, size_t columns, float gain,
                         float bias, float* values, uint8_t* bytes) {
  const int32x4_t half = vdupq_n_s32(1 << (kWeightBits - 1));
  for (size_t i = 0; i < columns; i += 8) {  // a plane is padded to 16 columns
    const uint8_t* quad = quads + i * 4;
    const int16_t* weight = taps->weights;
    int32x4_t hi0 = vdupq_n_s32(0), hi1 = hi0, lo0 = half, lo1 = half;
    size_t second = taps->first % 4 ? 1 : 0;  // half of the quad
    for (size_t p = 0; p < taps->pairs; ++p, weight += 4) {
      const uint8x8x4_t four = vld4_u8(quad);  // rows 0, 2, 1, 3
      for (int t = 0; t < 2; ++t) {
        const uint8x8_t row = second ? (t ? four.val[3] : four.val[1]) : (t ? four.val[2] : four.val[0]);
        const int16x8_t x = vreinterpretq_s16_u16(vmovl_u8(row));
        hi0 = vmlal_n_s16(hi0, vget_low_s16(x), weight[t]);
        hi1 = vmlal_n_s16(hi1, vget_high_s16(x), weight[t]);
        lo0 = vmlal_n_s16(lo0, vget_low_s16(x), weight[t + 2]);
        lo1 = vmlal_n_s16(lo1, vget_high_s16(x), weight[t + 2]);
      }
      if (second) quad += quad_stride;
      second = 1 - second;
    }
    const uint8x8_t byte = vqmovun_s16(vcombine_s16(finish(hi0, lo0), finish(hi1, lo1)));
    const size_t remaining = columns - i < 8 ? columns - i : 8;
    if (values) {
      const uint16x8_t wide = vmovl_u8(byte);
      float line[8];
      float* out = remaining == 8 ? values + i : line;
      const float32x4_t gains = vdupq_n_f32(gain), biases = vdupq_n_f32(bias);
      vst1q_f32(out, vaddq_f32(vmulq_f32(vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide))), gains), biases));
      vst1q_f32(out + 4, vaddq_f32(vmulq_f32(vcvtq_f32_u32(vmovl_u16(vget_high_u16(wide))), gains), biases));
      if (remaining < 8) __builtin_memcpy(values + i, line, remaining * sizeof(float));
    } else {
      uint8_t line[8];
      vst1_u8(line, byte);
      __builtin_memcpy(bytes + i, line, remaining);
    }
  }
}

}  // namespace calmclip
