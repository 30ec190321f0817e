#include "quant_depthwise.h"

#include <immintrin.h>

#include <cstring>

namespace calmclip {

extern "C" QuantDepthwise quant_depthwise_avxvnni;

namespace {

#include "dot_avxvnni.inc"
#include "quant_depthwise_256.inc"

struct V : Lanes {
  using X = __m256i;
  using W = __m256i;
  static constexpr size_t kTile = 4;

  static X x(const uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
  static W w(const int8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void dot(I& sum, X x, W w) { calmclip::dot(sum, x, w); }
};

#include "quant_depthwise_body.inc"

}  // namespace

void quant_depthwise_avxvnni(const DepthwiseWork& work, size_t first, size_t last) {
  depthwise<V, V>(work, first, last);
}

}  // namespace calmclip
