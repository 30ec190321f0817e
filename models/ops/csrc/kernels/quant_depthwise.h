// A depthwise convolution on uint8, channels last: QuantDepthwise of models/ops/spec.py.
// x uint8 [batch, height, width, channels], w int8 [h, w, channels], y [batch, out_height, out_width, channels].
//
// Channels are processed in blocks of 64, padded with 0. The bytes of four rows of x, one below the other, are
// interleaved, so that 32 bits hold the four bytes of one channel. A dot product of four bytes is then four taps. The
// interleaved bytes serve every column of y whose window covers them. If the window leaves some of the four or eight
// rows free, they also serve the next rows of y, with the weights shifted down by a stride. Interleaving within 128
// bits orders the channels of a block as 0 .. 3, 16 .. 19, 32 .. 35, 48 .. 51, then 4 .. 7, 20 .. 23, and so on.
// Weights and the constants of each channel are packed in this order, and the instructions that pack sums to bytes undo
// it.
//
// w is packed once: [block][row of y][four rows of x][column of w][channel of the block, in that order][4].
//
// Sums are exact in int32: 65536 * 255 * 128 < 2^31. Then float32: sum * scale + bias, rounded once, in steps of y;
// rounded half to even, + zero, clipped to 0 .. 255. With an `inverse`: sum * scale + bias, two roundings; * inverse.
#pragma once

#include <cstddef>
#include <cstdint>

namespace calmclip {

inline constexpr size_t kBlock = 64;  // channels
inline constexpr size_t kMostTaps = 65536;

// The index of a channel within its packed block.
inline constexpr size_t depthwise_place(size_t channel) {
  return channel % kBlock / 4 % 4 * 16 + channel % kBlock / 16 * 4 + channel % 4;
}

inline constexpr size_t depthwise_blocks(size_t channels) { return (channels + kBlock - 1) / kBlock; }

struct Window {
  size_t height, width;
  size_t down, across;  // strides

  // Rows of x that are interleaved together, in fours.
  constexpr size_t fours() const { return (height + 3) / 4; }
  // Whether kernels have a specialized version for this window.
  constexpr bool usual() const {
    return height == width && (width == 3 || width == 5 || width == 7) && (across == 1 || across == 2);
  }
  // Rows of y that are computed from them together.
  constexpr size_t rows() const { return usual() ? (4 * fours() - height) / down + 1 : 1; }
  // The most columns of y that are computed together, so that their bytes of x and the interleaved copy stay in an L1
  // cache.
  constexpr size_t most_columns() const { return usual() ? 48 / (fours() + across - 1) / 4 * 4 : 64; }
  constexpr size_t row_bytes() const { return fours() * width * 4 * kBlock; }
  constexpr size_t block_bytes() const { return rows() * row_bytes(); }
};

// w [h, w, channels] -> `packed`, depthwise_blocks(channels) * window.block_bytes() bytes, and the sum of each channel,
// in the order of the blocks.
void pack_depthwise(const int8_t* w, const Window& window, size_t channels, int8_t* packed, int32_t* sums);

struct DepthwiseWork {
  const uint8_t* x;
  uint8_t* y;
  size_t batch, height, width, channels;
  size_t out_height, out_width;
  size_t top, left;  // rows and columns of padding before those of x
  Window window;
  const int8_t* weights;
  const uint8_t* around;  // x outside the picture: `channels` times x_zero
  // For each channel, in the order of the blocks:
  const int32_t* start;  // -x_zero * the sum of the channel's weights, modulo 2^32
  const float* scale;    // x_scale * weight_scale [/ y_scale]
  const float* bias;
  const float* inverse;  // 1 / y_scale; or null: scale and bias are in steps of y, sum * scale + bias within +-2^30
  const int32_t* zero;

  // A unit is computed at once: one block of channels, some rows of some columns. Units are ordered from top to bottom,
  // then by columns, blocks and images.
  size_t strips() const { return (out_height + window.rows() - 1) / window.rows(); }
  size_t pieces() const { return (out_width + window.most_columns() - 1) / window.most_columns(); }
  size_t columns() const { return ((out_width + pieces() - 1) / pieces() + 3) / 4 * 4; }
  size_t units() const { return batch * depthwise_blocks(channels) * pieces() * strips(); }
};

// Computes the units [first, last).
using QuantDepthwise = void(const DepthwiseWork& work, size_t first, size_t last);

}  // namespace calmclip
