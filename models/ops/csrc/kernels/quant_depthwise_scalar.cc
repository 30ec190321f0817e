#include "quant_depthwise.h"

#include <cmath>

namespace calmclip {

extern "C" QuantDepthwise quant_depthwise_scalar;

namespace {

// One number of y.
uint8_t number(const DepthwiseWork& work, size_t image, size_t row, size_t column, size_t channel) {
  const Window& window = work.window;
  const size_t block = channel / kBlock, place = depthwise_place(channel), at = block * kBlock + place;
  const int8_t* weights = work.weights + block * window.block_bytes() + 4 * place;
  uint32_t sum = static_cast<uint32_t>(work.start[at]);  // may overflow int32; the final sum fits
  for (size_t i = 0; i < window.height; ++i)
    for (size_t j = 0; j < window.width; ++j) {
      // rows and columns before the picture are large numbers, and so outside too
      const size_t y = row * window.down + i - work.top, x = column * window.across + j - work.left;
      const bool inside = y < work.height && x < work.width;
      const uint8_t* from =
          inside ? work.x + ((image * work.height + y) * work.width + x) * work.channels : work.around;
      const int32_t byte = from[channel];
      sum += static_cast<uint32_t>(byte * weights[(i / 4 * window.width + j) * 4 * kBlock + i % 4]);
    }
  const float products = static_cast<float>(static_cast<int32_t>(sum)), scale = work.scale[at], bias = work.bias[at];
  float v = work.inverse ? (products * scale + bias) * work.inverse[at] : std::fma(products, scale, bias);
  v = v < 512 ? v : 512;  // larger values may overflow int32; all of them are clipped
  v = v > -512 ? v : -512;
  const int32_t q = static_cast<int32_t>(std::nearbyint(v)) + work.zero[at];
  return static_cast<uint8_t>(q < 0 ? 0 : q > 255 ? 255 : q);
}

}  // namespace

void quant_depthwise_scalar(const DepthwiseWork& work, size_t first, size_t last) {
  const size_t strips = work.strips(), pieces = work.pieces(), blocks = depthwise_blocks(work.channels);
  const size_t rows = work.window.rows(), columns = work.columns();
  for (size_t unit = first; unit < last; ++unit) {
    const size_t image = unit / strips / pieces / blocks, channel = unit / strips / pieces % blocks * kBlock;
    const size_t left = unit / strips % pieces * columns, top = unit % strips * rows;
    for (size_t row = top; row < top + rows && row < work.out_height; ++row)
      for (size_t column = left; column < left + columns && column < work.out_width; ++column) {
        uint8_t* y = work.y + ((image * work.out_height + row) * work.out_width + column) * work.channels;
        for (size_t c = channel; c < channel + kBlock && c < work.channels; ++c)
          y[c] = number(work, image, row, column, c);
      }
  }
}

}  // namespace calmclip
