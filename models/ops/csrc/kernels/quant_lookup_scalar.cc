#include "quant_lookup.h"

namespace calmclip {

extern "C" QuantLookup quant_lookup_scalar;

void quant_lookup_scalar(const uint8_t* x, uint8_t* y, size_t count, const uint8_t* table) {
  for (size_t i = 0; i < count; ++i) y[i] = table[x[i]];
}

}  // namespace calmclip
