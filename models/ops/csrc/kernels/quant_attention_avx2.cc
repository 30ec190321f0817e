#include "quant_attention.h"

#include <immintrin.h>

#include <cfloat>
#include <climits>
#include <cstring>

namespace calmclip {

extern "C" QuantAttention quant_attention_avx2;

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 64")
#endif

namespace {

#include "quant_attention_256.inc"

// In 16 bits: the instruction for pairs of byte products (vpmaddubsw) saturates, the one for pairs of 16 bits does not.
struct V : Lanes {
  using K = int16_t;
  static constexpr size_t kPack = 2, kTile = 12, kWords = 16;

  // Written out: gcc 12 multiplies for all sums before it adds, and then spills half of the products.
  static void dot(I& sum, I x, const K* k) {
    typedef int32_t __attribute__((may_alias)) Word;
    I product;
    asm("vpbroadcastd %2, %1\n\tvpmaddwd %1, %3, %1\n\tvpaddd %1, %0, %0"
        : "+x"(sum), "=&x"(product)
        : "m"(*reinterpret_cast<const Word*>(k)), "x"(x));
  }

  static I count(I sum, I p) { return _mm256_add_epi32(sum, _mm256_madd_epi16(p, _mm256_set1_epi16(1))); }
  static I pack(const I (&p)[2]) { return _mm256_blend_epi16(p[0], _mm256_slli_epi32(p[1], 16), 0xaa); }

  static void keep(const uint8_t* k, size_t step, size_t rows, size_t n, K* out, int32_t* sums, bool more) {
    for (size_t s = 0; s < rows; ++s, k += step, out += 32) {
      int32_t sum = more ? sums[s] : 0;
      for (size_t i = 0; i < n; ++i) {
        out[i] = static_cast<K>(k[i] - 128);
        sum += out[i];
      }
      for (size_t i = n; i < 32; ++i) out[i] = 0;
      sums[s] = sum;
    }
  }

  static void weave(const uint8_t* v, size_t step, size_t rows, size_t n, K* out) {
    for (size_t i = 0; i < n; ++i) {
      out[2 * i] = static_cast<K>(v[i] - 128);
      out[2 * i + 1] = rows == 2 ? static_cast<K>(v[step + i] - 128) : K{0};
    }
    for (size_t i = n; i % 4; ++i) out[2 * i] = out[2 * i + 1] = 0;
  }

  static void panel(const uint8_t* q, size_t step, size_t rows, size_t dims, I* out) {
    auto* const y = reinterpret_cast<uint16_t*>(out);
    for (size_t r = 0; r < kWidth; ++r)
      for (size_t i = 0; i < (dims + 1) / 2 * 2; ++i)
        y[i / 2 * 16 + r * 2 + i % 2] = r < rows && i < dims ? q[r * step + i] : 0;
  }
};

#include "quant_attention_body.inc"

}  // namespace

void quant_attention_avx2(const AttentionHead& head, void* scratch) { Head(head, scratch).rows(); }

}  // namespace calmclip
