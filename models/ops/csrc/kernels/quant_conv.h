// y = quantize(convolution), x and y uint8 with channels last. A convolution is quant_linear of every window, and no
// window is copied: a row of a window is `wide` neighbouring places of x, so it is wide * channels adjacent bytes.
// Windows at the border are copied, a tile at a time, with x_zero around the picture.
//
// The weight [high, wide, channels, n] is packed as quant_linear's is, each of its `high` parts [wide * channels, n]
// alone, padded with 0 to a multiple of four rows: [n/32][high][wide * channels / 4][32][4]. high * wide * channels, so
// padded, is at most kMostK.
#pragma once

#include <cstddef>
#include <cstdint>

#include "quant_linear.h"

namespace calmclip {

inline constexpr size_t kConvPlaces = 14;  // the most places of a tile

// The words of four bytes in a row of a window.
inline constexpr size_t conv_steps(size_t wide, size_t channels) { return (wide * channels + 3) / 4; }

// `panels`: linear_panels(n) * high * conv_steps * 4 * kPanel bytes; `sums`: linear_panels(n) * kPanel numbers.
void pack_conv(const int8_t* w, size_t high, size_t wide, size_t channels, size_t n, int8_t* panels, int32_t* sums);

struct ConvWork {
  LinearWork of;  // of.x is the picture; of.rows and of.k are not read, of.activation is none
  size_t height, width, channels, out_height, out_width;
  size_t top, left;  // pads
  size_t high, wide, down, across;  // the window and its strides
  uint8_t around;    // x_zero

  size_t steps() const { return conv_steps(wide, channels); }
  size_t panel_bytes() const { return high * steps() * 4 * kPanel; }
  size_t pitch() const { return (across < wide ? across : wide) * channels; }  // of places in a copy
  // The bytes of a line of a tile's copy; a kernel reads up to three bytes past a window.
  size_t line_bytes() const { return (kConvPlaces - 1) * pitch() + wide * channels + 3; }
};

// The rows [first_row, last_row) of y, of all pictures, and the panels [first, last) of its columns. `lines`: room for
// `high` pointers; `room`: for high + 1 lines.
struct ConvPart {
  size_t first_row, last_row, first, last;
  const uint8_t** lines;
  uint8_t* room;
};

using QuantConv = void(const ConvWork& work, const ConvPart& part);

// The same for a window of 3 x 3 with strides of 1, by a quarter of the products. Source: Lavin and Gray 2015 (arXiv
// 1509.09308), F(4 x 4, 3 x 3). With B', G and A of that paper and the rows of G times 4, 6, 6, 24, 24 and 1:
//
//     tile of y = A' [sum over the channels of (G w G') * (B' (x - x_zero) B)] A / 576,   A with its columns times 6, 4,
//     4, 1, 1 and 24
//
// where * multiplies place by place. Every number is an integer, so the result is exact, not near. Tiles of x and w fit
// 16 bits: at most 100 * 255 and 49 * 128. The sums are computed modulo 2^32. 576 is 9 * 64, and 9 has an inverse modulo
// 2^32, so the quotient is known modulo 2^26; it is right if the sum of a column's |w| is under kMostWeights.
//
// On aarch64 they do not pay: its vectors multiply 16 bits in fours, but bytes in groups of 16 or 32, so a fourth of
// the products takes no fewer instructions, and the transforms come on top.
#if defined(__aarch64__)
inline constexpr bool kTilesPay = false;
#else
inline constexpr bool kTilesPay = true;
#endif
inline constexpr size_t kTile = 4, kTileIn = 6, kTilePlaces = kTileIn * kTileIn;  // sides of a tile of y and of x
inline constexpr size_t kTileBlock = 7;      // the most tiles at a time; the sums of more leave the first cache
inline constexpr size_t kTileChannels = 32;  // channels are a multiple of it
inline constexpr size_t kMostWeights = (1 << 25) / 255;
inline constexpr uint32_t kNinth = 0x38e38e39;  // times 9 it is 1 modulo 2^32

// The 16-bit words of G w G', in panels: [n/32][36][channels/2][32][2].
inline constexpr size_t conv_tile_words(size_t channels, size_t n) {
  return linear_panels(n) * kTilePlaces * channels * kPanel;
}

// `words`: conv_tile_words(channels, n). False if a column's |w| are too many; then nothing is packed.
bool pack_conv_tiles(const int8_t* w, size_t channels, size_t n, int16_t* words);

// Tiles [first, last) of y, of all pictures row by row. Room for 36 * kTileBlock * channels numbers of x, 36 * kTileBlock
// * kPanel sums, and 36 * channels bytes.
struct ConvTilesPart {
  const int16_t* words;
  size_t first, last;
  int16_t* x;
  int32_t* sums;
  uint8_t* room;
};

using QuantConvTiles = void(const ConvWork& work, const ConvTilesPart& part);

}  // namespace calmclip
