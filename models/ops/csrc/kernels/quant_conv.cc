#include "quant_conv.h"

#include <cstring>
#include <vector>

namespace calmclip {

void pack_conv(const int8_t* w, size_t high, size_t wide, size_t channels, size_t n, int8_t* panels, int32_t* sums) {
  const size_t part = wide * channels, padded = 4 * conv_steps(wide, channels);
  std::vector<int8_t> rows(high * padded * n);
  for (size_t i = 0; i < high; ++i)
    if (part > 0 && n > 0) std::memcpy(&rows[i * padded * n], w + i * part * n, part * n);
  pack_linear(rows.data(), high * padded, n, panels, sums);
}

bool pack_conv_tiles(const int8_t* w, size_t channels, size_t n, int16_t* words) {
  for (size_t column = 0; column < n; ++column) {
    size_t sum = 0;
    for (size_t i = column; i < 9 * channels * n; i += n) sum += static_cast<size_t>(w[i] < 0 ? -w[i] : w[i]);
    if (sum >= kMostWeights) return false;
  }
  constexpr int kRows[kTileIn][3] = {{1, 0, 0}, {-1, -1, -1}, {-1, 1, -1}, {1, 2, 4}, {1, -2, 4}, {0, 0, 1}};
  std::memset(words, 0, conv_tile_words(channels, n) * sizeof *words);
  for (size_t i = 0; i < kTileIn; ++i)
    for (size_t j = 0; j < kTileIn; ++j)
      for (size_t channel = 0; channel < channels; ++channel)
        for (size_t column = 0; column < n; ++column) {
          int number = 0;
          for (size_t a = 0; a < 3; ++a)
            for (size_t b = 0; b < 3; ++b)
              number += kRows[i][a] * kRows[j][b] * w[((a * 3 + b) * channels + channel) * n + column];
          const size_t panel = column / kPanel * kTilePlaces + i * kTileIn + j;
          words[((panel * channels / 2 + channel / 2) * kPanel + column % kPanel) * 2 + channel % 2] =
              static_cast<int16_t>(number);
        }
  return true;
}

}  // namespace calmclip
