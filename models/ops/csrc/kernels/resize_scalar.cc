#include "resize.h"

namespace calmclip {

extern "C" ResizeRows resize_rows_scalar;
extern "C" ResizeColumns resize_columns_scalar;

static uint8_t to_byte(uint32_t sum) {
  const int32_t value = static_cast<int32_t>(sum) >> kWeightBits;
  return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
}

static uint32_t weight(const int16_t* weights, size_t tap) {
  const int16_t* pair = weights + tap / 2 * 4 + tap % 2;
  return static_cast<uint32_t>(pair[0]) * 65536u + static_cast<uint32_t>(pair[2]);
}

static const uint32_t kHalf = 1u << (kWeightBits - 1);
static const size_t kPlace[4] = {0, 2, 1, 3};  // of a row within its quad

void resize_rows_scalar(const uint8_t* const* rows, const uint8_t* const*, size_t pixel_stride, size_t base,
                        size_t width, const Taps* taps, size_t columns, int16_t*, uint8_t* quads,
                        size_t quad_stride) {
  const size_t plane = (columns + kQuadColumns - 1) / kQuadColumns * kQuadColumns * 4;
  for (size_t i = 0; i < columns; ++i) {
    const size_t from = taps[i].first - base;
    const size_t count = from + taps[i].pairs * 2 > width ? width - from : taps[i].pairs * 2;
    uint32_t sum[kBlockRows][3];
    for (size_t r = 0; r < kBlockRows; ++r) sum[r][0] = sum[r][1] = sum[r][2] = kHalf;
    for (size_t t = 0; t < count; ++t) {
      const uint32_t w = weight(taps[i].weights, t);
      const size_t at = (from + t) * pixel_stride;
      for (size_t r = 0; r < kBlockRows; ++r) {
        const uint8_t* pixel = rows[r] + at;
        sum[r][0] += w * pixel[0];
        sum[r][1] += w * pixel[1];
        sum[r][2] += w * pixel[2];
      }
    }
    for (size_t r = 0; r < kBlockRows; ++r)
      for (size_t c = 0; c < 3; ++c)
        quads[r / 4 * quad_stride + c * plane + i * 4 + kPlace[r % 4]] = to_byte(sum[r][c]);
  }
}

void resize_columns_scalar(const uint8_t* quads, size_t quad_stride, const Taps* taps, size_t columns, float gain,
                           float bias, float* values, uint8_t* bytes) {
  constexpr size_t kRun = 64;
  for (size_t i = 0; i < columns; i += kRun) {
    const size_t n = columns - i < kRun ? columns - i : kRun;
    uint32_t sum[kRun];
    for (size_t k = 0; k < n; ++k) sum[k] = kHalf;
    for (size_t t = 0; t < taps->pairs * 2; ++t) {
      const size_t row = taps->first % 4 + t;
      const uint32_t w = weight(taps->weights, t);
      const uint8_t* quad = quads + row / 4 * quad_stride + i * 4 + kPlace[row % 4];
      for (size_t k = 0; k < n; ++k) sum[k] += w * quad[k * 4];
    }
    for (size_t k = 0; k < n; ++k) {
      const uint8_t byte = to_byte(sum[k]);
      if (values)
        values[i + k] = static_cast<float>(byte) * gain + bias;
      else
        bytes[i + k] = byte;
    }
  }
}

}  // namespace calmclip
