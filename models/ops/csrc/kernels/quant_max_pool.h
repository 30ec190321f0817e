// y[b, i, j, c] = the greatest of x[b, ., ., c] in a window; 0 if the window lies outside of the picture. uint8,
// channels last.
#pragma once

#include <cstddef>
#include <cstdint>

namespace calmclip {

struct MaxPoolWork {
  const uint8_t* x;
  uint8_t* y;
  size_t height, width, channels, out_height, out_width;
  size_t top, left;                 // pads
  size_t high, wide, down, across;  // the window and its strides
};

// The rows [first, last) of y, of all pictures. `line`: room for width * channels bytes.
using QuantMaxPool = void(const MaxPoolWork& work, size_t first, size_t last, uint8_t* line);

}  // namespace calmclip
