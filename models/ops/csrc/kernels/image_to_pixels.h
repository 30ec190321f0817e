// A picture -> the pixels a graph takes: resized as Pillow does it, cut or padded, normalised. Portable; the two passes
// are kernels. Knows nothing of ONNX Runtime.
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

// RGB, 8 bits: 3 bytes a pixel, or 4 of which the last is not looked at. Of the picture's `height` rows those from
// `first` on, `rows` of them, lie at `data`; mostly all do. models/ops/pixels.py lays it out the same.
struct Picture {
  const uint8_t* data;
  size_t height, width;
  size_t row_stride, pixel_stride;  // bytes
  size_t first, rows;

  const uint8_t* row(size_t number) const {  // the nearest that is there
    const size_t at = number < first ? 0 : number - first;
    return data + (at < rows ? at : rows - 1) * row_stride;
  }
};

// As Pillow does since version 13: along the columns first where the height shrinks by much more than the width. The
// bytes between the passes are rounded, so the order shows.
constexpr bool columns_first(size_t height, size_t width, size_t resized_height, size_t resized_width) {
  return height > resized_height && (width <= resized_width || (height - resized_height) / 2.0 > width - resized_width);
}

// The picture is resized to resized_height x resized_width; of that, what starts at (top, left) fills the output from
// its upper left corner; what it does not fill is `pad`. models/ops/pixels.py lays it out the same.
struct Placement {
  size_t resized_height, resized_width, top, left, height, width;
  uint8_t pad;

  size_t rows() const { return height < resized_height - top ? height : resized_height - top; }
  size_t columns() const { return width < resized_width - left ? width : resized_width - left; }
};

// Where pixels go, [3, height, width]: `values` = byte * gain[c] + bias[c] in float32, two roundings; or, where it is
// null, `bytes` = table[c][byte].
struct Sink {
  float* values;
  const float *gain, *bias;
  uint8_t* bytes;
  const uint8_t (*table)[256];
};

// A form of the two passes; all give the same bits.
struct Passes {
  ResizeRows* rows;
  ResizeColumns* columns;
};

// The weights of both axes, worked out once; `run` makes any rows of the output, from several threads at once.
// Methods return false when memory is short; nothing throws.
class ImageToPixels {
 public:
  // Null when the numbers make sense, else what does not.
  static const char* check(const Picture&, const Placement&);

  // To be called once, with what `check` takes.
  bool prepare(const Picture&, const Placement&, Filter, Passes);

  // Whether the rows that are there make the output rows [first, last).
  bool covers(size_t first, size_t last) const;

  // Output rows [first, last), last <= height.
  bool run(size_t first, size_t last, const Sink&) const;

  // Source rows that one output row is made of, at most.
  size_t window() const { return down_.widest; }

  struct Axis {
    std::unique_ptr<Taps[]> taps;
    std::unique_ptr<size_t[]> keep;  // no later output needs a source index below this
    std::unique_ptr<int16_t[]> weights;
    size_t widest = 0, end = 0;  // taps of an output at most; past the last source index with weight

    bool fill(size_t source, size_t resized, size_t first, size_t count, Filter filter);
  };

 private:
  bool resize(size_t first, size_t last, const Sink&) const;

  Picture picture_;
  Placement placement_;
  Filter filter_;
  Passes passes_;
  Axis across_, down_;
  Axis same_;  // of the source columns that are needed, where the columns are resized first
  bool columns_first_ = false;
};

}  // namespace calmclip
