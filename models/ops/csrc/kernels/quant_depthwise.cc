#include "quant_depthwise.h"

#include <cstring>

namespace calmclip {

void pack_depthwise(const int8_t* w, const Window& window, size_t channels, int8_t* packed, int32_t* sums) {
  const size_t blocks = depthwise_blocks(channels);
  std::memset(packed, 0, blocks * window.block_bytes());
  for (size_t i = 0; i < blocks * kBlock; ++i) sums[i] = 0;
  for (size_t i = 0; i < window.height; ++i)
    for (size_t j = 0; j < window.width; ++j, w += channels)
      for (size_t c = 0; c < channels; ++c) {
        const size_t place = depthwise_place(c);
        sums[c / kBlock * kBlock + place] += w[c];
        int8_t* to = packed + c / kBlock * window.block_bytes();
        for (size_t row = 0; row < window.rows(); ++row, to += window.row_bytes()) {
          const size_t below = i + row * window.down;
          to[((below / 4 * window.width + j) * kBlock + place) * 4 + below % 4] = w[c];
        }
      }
}

}  // namespace calmclip
