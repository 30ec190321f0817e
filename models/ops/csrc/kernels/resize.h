// The two passes of Pillow's antialiased resize of 8-bit pictures, exact to the bit: along the rows into 8 bits, then
// along the columns. Weights are 22-bit fixed point, sums wrap at 32 bits (the true sum fits), rounding is half up.
//
// A weight is split as hi * 65536 + lo, both int16, so that 16-bit multiply-adds of pairs of taps sum it exactly.
// Between the passes lie quads: for each channel and column the bytes of four rows, in the order 0, 2, 1, 3. A mask
// gives the pair (0, 1) as two 16-bit numbers, a shift by eight the pair (2, 3).
#pragma once

#include <cstddef>
#include <cstdint>

namespace calmclip {

inline constexpr int kWeightBits = 22;
inline constexpr size_t kBlockRows = 16;    // source rows that ResizeRows takes at once: four quads
inline constexpr size_t kQuadColumns = 16;  // a plane of a quad is padded to a multiple of these

// What one output is the weighted sum of. `first`: an even source index; `weights`: int16 [pairs][4], each
// hi(first), hi(second), lo(first), lo(second). Taps past the end of the source weigh 0.
struct Taps {
  size_t first, pairs;
  const int16_t* weights;
};

// int16 that ResizeRows needs as scratch for `width` source pixels.
constexpr size_t resize_scratch(size_t width) { return (width + 3) / 4 * 4 * 3 * kBlockRows; }

// Along the rows: 16 source rows, RGB -> four quads. Output column i is the sum of taps[i] over source pixels.
// rows[r]: the pixel number `base` (even) of a source row, of which `width` pixels of `pixel_stride` (3 or 4) bytes are
// there to read; the taps stay within them, save for those that weigh 0. columns >= 1.
// scratch: int16 [resize_scratch(width)]; quads: uint8 [4][3][padded columns][4], quad_stride bytes apart. Both 64-byte
// aligned, quad_stride a multiple of 64. Padding is written or not.
// next: the same of the 16 rows that will be asked for next, to be fetched into the cache meanwhile: a picture that
// lies further away costs as much as the sums do.
using ResizeRows = void(const uint8_t* const* rows, const uint8_t* const* next, size_t pixel_stride, size_t base,
                        size_t width, const Taps* taps, size_t columns, int16_t* scratch, uint8_t* quads,
                        size_t quad_stride);

// Along the columns: one output row of one channel. quads: the channel's plane in the quad that holds row taps->first,
// the next quad quad_stride bytes on; padded as ResizeRows leaves it.
// Where `values` is not null: values[i] = byte * gain + bias, two roundings; else bytes[i] = byte.
// No more than `columns` are written.
using ResizeColumns = void(const uint8_t* quads, size_t quad_stride, const Taps* taps, size_t columns, float gain,
                           float bias, float* values, uint8_t* bytes);

}  // namespace calmclip
