#include "quant_add.h"

#include <cmath>

namespace calmclip {

extern "C" QuantAdd quant_add_scalar;

void quant_add_scalar(const AddBlock& block) {
  for (size_t row = 0; row < block.rows; ++row)
    for (size_t i = 0, at = row * block.step; i < block.width; ++i, ++at) {
      const size_t place = add_place(i);
      const float b = std::fma(static_cast<float>(block.b[at]), block.b_factor[place], block.start[place]);
      const float sum = std::fma(static_cast<float>(block.a[at]), block.a_factor[place], b);
      const int32_t q = static_cast<int32_t>(std::nearbyint(sum)) + block.zero[place];
      block.y[at] = static_cast<uint8_t>(q < 0 ? 0 : q > 255 ? 255 : q);
    }
}

}  // namespace calmclip
