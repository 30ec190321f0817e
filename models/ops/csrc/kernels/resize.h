// The two passes of Pillow's antialiased resize of 8-bit pictures, exact to the bit: first along the rows, rounded to 8
// bits, then along the columns. Weights are 22-bit fixed point. Sums wrap at 32 bits (the true sum fits). Rounding is
// half up.
//
// A weight is split as hi * 65536 + lo, both int16, so that 16-bit multiply-adds of pairs of taps compute the exact
// sum. The data between the passes is quads: for each channel and column the bytes of four rows, in the order 0, 2, 1,
// 3. A mask gives the pair (0, 1) as two 16-bit numbers; a shift by eight gives the pair (2, 3).
#pragma once

#include <cstddef>
#include <cstdint>

namespace calmclip {

inline constexpr int kWeightBits = 22;
inline constexpr size_t kBlockRows = 16;    // source rows of one ResizeRows call: four quads
inline constexpr size_t kQuadColumns = 16;  // a plane of a quad is padded to a multiple of this

// The weights of one output. `first`: an even source index. `weights`: int16 [pairs][4], each hi(first), hi(second),
// lo(first), lo(second). Taps past the end of the source have weight 0.
struct Taps {
  size_t first, pairs;
  const int16_t* weights;
};

// The int16 of scratch that ResizeRows needs for `width` source pixels.
constexpr size_t resize_scratch(size_t width) { return (width + 3) / 4 * 4 * 3 * kBlockRows; }

// Along the rows: 16 source rows, RGB -> four quads. Output column i is the sum of taps[i] over source pixels. rows[r]
// is pixel number `base` (even) of a source row; `width` pixels of `pixel_stride` (3 or 4) bytes are readable from
// there. Taps with a weight stay within these pixels. columns >= 1. scratch: int16 [resize_scratch(width)]. quads:
// uint8 [4][3][padded columns][4], quad_stride bytes apart. Both are 64-byte aligned, and quad_stride is a multiple of
// 64. The padding may be overwritten. next: the rows of the next call, to be prefetched. A picture beyond the caches
// takes as long to load as the sums take.
using ResizeRows = void(const uint8_t* const* rows, const uint8_t* const* next, size_t pixel_stride, size_t base,
                        size_t width, const Taps* taps, size_t columns, int16_t* scratch, uint8_t* quads,
                        size_t quad_stride);

// Along the columns: one output row of one channel. quads: the channel's plane in the quad that holds row taps->first;
// the next quad is quad_stride bytes further. Planes are padded as ResizeRows leaves them. If `values` is not null,
// values[i] = byte * gain + bias, two roundings; else bytes[i] = byte. At most `columns` numbers are written.
using ResizeColumns = void(const uint8_t* quads, size_t quad_stride, const Taps* taps, size_t columns, float gain,
                           float bias, float* values, uint8_t* bytes);

}  // namespace calmclip
