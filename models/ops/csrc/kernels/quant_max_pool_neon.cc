#include "quant_max_pool.h"

namespace calmclip {

extern "C" QuantMaxPool quant_max_pool_neon;

namespace {
#include "quant_max_pool_body.inc"
}  // namespace

void quant_max_pool_neon(const MaxPoolWork& work, size_t first, size_t last, uint8_t* line) {
  max_pool(work, first, last, line);
}

}  // namespace calmclip
