// A picture -> the pixels that a graph takes: resized as Pillow does it, cropped or padded, normalized. Portable code;
// the two passes are kernels. It does not use ONNX Runtime.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include "resize.h"

namespace calmclip {

inline constexpr size_t kMaxSide = 65536;   // of a picture
inline constexpr size_t kMaxInput = 4096;   // of a graph's input
inline constexpr size_t kMaxResized = size_t{1} << 31;

enum class Filter { bilinear, bicubic };

// RGB, 8 bits: 3 bytes a pixel, or 4 of which the last is ignored. `data` holds `rows` of the picture's `height` rows,
// from row `first` on; usually all rows. models/ops/pixels.py declares the same layout.
struct Picture {
  const uint8_t* data;
  size_t height, width;
  size_t row_stride, pixel_stride;  // bytes
  size_t first, rows;

  const uint8_t* row(size_t number) const {  // the nearest row that `data` holds
    const size_t at = number < first ? 0 : number - first;
    return data + (at < rows ? at : rows - 1) * row_stride;
  }
};

// As Pillow does since version 13: columns first if the height shrinks much more than the width. The intermediate bytes
// are rounded, so the order changes the result.
constexpr bool columns_first(size_t height, size_t width, size_t resized_height, size_t resized_width) {
  return height > resized_height && (width <= resized_width || (height - resized_height) / 2.0 > width - resized_width);
}

// The picture is resized to resized_height x resized_width. The part from (top, left) on fills the output from its
// upper left corner; the remaining output is `pad`. models/ops/pixels.py declares the same layout.
struct Placement {
  size_t resized_height, resized_width, top, left, height, width;
  uint8_t pad;

  size_t rows() const { return height < resized_height - top ? height : resized_height - top; }
  size_t columns() const { return width < resized_width - left ? width : resized_width - left; }
};

// The output, [3, height, width]: `values` = byte * gain[c] + bias[c] in float32, two roundings; or `bytes` =
// table[c][byte] if `values` is null.
struct Sink {
  float* values;
  const float *gain, *bias;
  uint8_t* bytes;
  const uint8_t (*table)[256];
};

// The two passes of one instruction set. All instruction sets give the same bits.
struct Passes {
  ResizeRows* rows;
  ResizeColumns* columns;
};

// Computes the weights of both axes once. `run` then computes any rows of the output, on several threads at the same
// time. Methods return false if there is no memory; none throws.
class ImageToPixels {
 public:
  // Null if the numbers are in range, else the reason why not.
  static const char* check(const Picture&, const Placement&);

  // Call it once, with the arguments that `check` accepted.
  bool prepare(const Picture&, const Placement&, Filter, Passes);

  // Whether the source rows in memory suffice for the output rows [first, last).
  bool covers(size_t first, size_t last) const;

  // Computes output rows [first, last), last <= height.
  bool run(size_t first, size_t last, const Sink&) const;

  // The largest number of source rows that one output row needs.
  size_t window() const { return down_.widest; }

  struct Axis {
    std::unique_ptr<Taps[]> taps;
    std::unique_ptr<size_t[]> keep;  // outputs from this one on need no source index below this
    std::unique_ptr<int16_t[]> weights;
    size_t widest = 0, end = 0;  // the most taps of an output; one past the last source index with a weight

    bool fill(size_t source, size_t resized, size_t first, size_t count, Filter filter);
  };

 private:
  bool resize(size_t first, size_t last, const Sink&) const;

  Picture picture_;
  Placement placement_;
  Filter filter_;
  Passes passes_;
  Axis across_, down_;
  Axis same_;  // of the needed source columns, if the columns are resized first
  bool columns_first_ = false;
};

}  // namespace calmclip
