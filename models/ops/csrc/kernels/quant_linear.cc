#include "quant_linear.h"

#include <cstring>

namespace calmclip {

void pack_linear(const int8_t* w, size_t k, size_t n, int8_t* panels, int32_t* sums) {
  for (size_t column = 0; column < n; column += kPanel) {
    const size_t columns = n - column < kPanel ? n - column : kPanel;
    int32_t* sum = sums + column;
    std::memset(sum, 0, kPanel * sizeof *sum);
    for (size_t row = 0; row < k; row += 4, panels += 4 * kPanel) {
      const size_t rows = k - row < 4 ? k - row : 4;
      const int8_t* from = w + row * n + column;
      if (rows == 4 && columns == kPanel) {  // constant bounds let compilers vectorize the loops
        for (size_t c = 0; c < kPanel; ++c)
          for (size_t r = 0; r < 4; ++r) panels[4 * c + r] = from[r * n + c];
      } else {
        std::memset(panels, 0, 4 * kPanel);
        for (size_t c = 0; c < columns; ++c)
          for (size_t r = 0; r < rows; ++r) panels[4 * c + r] = from[r * n + c];
      }
      for (size_t r = 0; r < rows; ++r)
        for (size_t c = 0; c < columns; ++c) sum[c] += from[r * n + c];
    }
  }
}

}  // namespace calmclip
