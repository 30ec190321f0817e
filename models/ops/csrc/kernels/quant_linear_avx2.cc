#include "quant_linear.h"

#include <immintrin.h>

#include <cstring>

#include "activation_curve.h"
#include "quant_conv.h"

namespace calmclip {

extern "C" QuantLinear quant_linear_avx2;
extern "C" QuantConv quant_conv_avx2;
extern "C" QuantConvTiles quant_conv_tiles_avx2;
extern "C" Int8Peak int8_peak_avx2;

namespace {

#include "quant_linear_256.inc"

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline void store(int32_t* p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }

inline __m256i four(const uint8_t* x) {
  int32_t bytes;
  std::memcpy(&bytes, x, sizeof bytes);
  return _mm256_set1_epi32(bytes);
}

// Not the intrinsic: with it gcc 12 keeps a tile's sums in memory.
inline void add32(__m256i& sum, __m256i a) { asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(a)); }

inline __m256i dot(__m256i sum, __m256i x, __m256i w) { return _mm256_add_epi32(sum, _mm256_madd_epi16(x, w)); }

// What x + row * stride needs beside a multiple of the stride by 1, 2, 4 or 8: then no row has a pointer of its own.
struct Rows {
  size_t stride, three, five, seven, nine;
  explicit Rows(size_t stride)
      : stride(stride), three(3 * stride), five(5 * stride), seven(7 * stride), nine(9 * stride) {
    asm("" : "+r"(three), "+r"(five), "+r"(seven), "+r"(nine));  // gcc would add them up from the stride
  }
  const uint8_t* operator()(const uint8_t* x, size_t row) const {
    switch (row) {
      case 3: return x + three;
      case 5: return x + five;
      case 6: return x + 2 * three;
      case 7: return x + seven;
      case 9: return x + nine;
      default: return x + row * stride;
    }
  }
};

// Eight columns of a tile.
template <size_t rows>
struct Columns {
  const uint8_t* x;
  const int8_t* w;  // of the first step; those of the next are 4 * kPanel further
  const int8_t* ahead;
  size_t ahead_step;  // for each step
  Rows row;

  // sum += the products of `count` groups of `together` steps, which are added in 16 bits. `forms`: null, or the orders
  // of bytes by form. -> the end of the groups.
  template <size_t together, bool formed>
  const uint16_t* groups(__m256i (&sum)[rows], const uint16_t* steps, size_t count, const __m256i* forms) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (const uint16_t* last = steps + count * together; steps != last; steps += together) {
      const uint8_t* at[together];
      __m256i columns[together], form[together];
#pragma GCC unroll 2
      for (size_t i = 0; i < together; ++i) {
        const size_t step = formed ? steps[i] % (1 << kFormShift) : steps[i];
        at[i] = x + 4 * step;
        columns[i] = load(w + 4 * kPanel * step);
        if constexpr (formed) {
          form[i] = forms[steps[i] >> kFormShift];
          columns[i] = _mm256_shuffle_epi8(columns[i], form[i]);
        }
        asm("" : "+r"(at[i]), "+x"(columns[i]));
      }
      _mm_prefetch(ahead, _MM_HINT_T1);
      ahead += together * ahead_step;
#pragma GCC unroll 16
      for (size_t r = 0; r < rows; ++r) {
        __m256i words;
#pragma GCC unroll 2
        for (size_t i = 0; i < together; ++i) {
          __m256i bytes = four(row(at[i], r));
          if constexpr (formed) bytes = _mm256_shuffle_epi8(bytes, form[i]);
          const __m256i products = _mm256_maddubs_epi16(bytes, columns[i]);
          words = i ? _mm256_add_epi16(words, products) : products;
        }
        add32(sum[r], _mm256_madd_epi16(words, ones));
      }
    }
    return steps;
  }

  // sum += the products of `count` steps in 16 bits: those of the first and third bytes of four, and of the others.
  // `steps`: null, or which steps.
  void wide(__m256i (&sum)[rows], const uint16_t* steps, size_t count) {
    const __m256i low = _mm256_set1_epi16(255);
    for (size_t i = 0; i < count; ++i) {
      const size_t step = steps ? steps[i] : i;
      const uint8_t* at = x + 4 * step;
      const __m256i columns = load(w + 4 * kPanel * step);
      __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(columns, 8), 8), odd = _mm256_srai_epi16(columns, 8);
      asm("" : "+r"(at), "+x"(even), "+x"(odd));
      _mm_prefetch(ahead, _MM_HINT_T1);
      ahead += ahead_step;
#pragma GCC unroll 16
      for (size_t r = 0; r < rows; ++r) {
        const __m256i bytes = four(row(at, r));
        add32(sum[r], _mm256_madd_epi16(_mm256_and_si256(bytes, low), even));
        add32(sum[r], _mm256_madd_epi16(_mm256_srli_epi16(bytes, 8), odd));
      }
    }
  }
};

template <size_t rows>
void product_of(const Product& p) {
  constexpr size_t kParts = kPanel / kOrderColumns;
  const bool ordered = p.order && *p.order != kUnordered;
  __m256i forms[kForms];
  const __m256i columns_of_four = _mm256_broadcastsi128_si256(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c));
  for (size_t form = 0; form < kForms; ++form) forms[form] = _mm256_add_epi8(four(kForm[form]), columns_of_four);
  for (size_t part = 0; part * kOrderColumns < p.columns; ++part) {
    const size_t column = part * kOrderColumns;
    __m256i sum[rows];
#pragma GCC unroll 16
    for (size_t r = 0; r < rows; ++r) sum[r] = load(p.from + r * p.from_stride + column);
    Columns<rows> columns{p.x, p.panel + 4 * column, p.ahead + part * p.steps * p.ahead_step / kParts,
                          (p.ahead_step + kParts - 1) / kParts, Rows(p.stride)};
    if (ordered) {
      const uint16_t *const counts = p.order + part * (p.steps + kOrderCounts), *const first = counts + kOrderCounts;
      const uint16_t* const next = counts + linear_order_numbers(4 * p.steps);  // of the next panel
      for (size_t at = 0; at < p.steps + kOrderCounts; at += 64 / sizeof *next) _mm_prefetch(next + at, _MM_HINT_T1);
      const uint16_t* steps = columns.template groups<2, false>(sum, first, counts[0], forms);
      steps = columns.template groups<2, true>(sum, steps, counts[1], forms);
      steps = columns.template groups<1, true>(sum, steps, counts[2], forms);
      columns.wide(sum, steps, static_cast<size_t>(first + p.steps - steps));
    } else {
      columns.wide(sum, nullptr, p.steps);
    }
#pragma GCC unroll 16
    for (size_t r = 0; r < rows; ++r) store(p.sums + r * kPanel + column, sum[r]);
  }
}

// One or two rows, all columns of the panel, in 16 bits: bytes of x are widened once.
template <size_t rows>
void few_rows(const Product& p) {
  constexpr size_t kParts = kPanel / kOrderColumns;
  const __m256i low = _mm256_set1_epi16(255);
  __m256i sum[rows][kParts];
#pragma GCC unroll 2
  for (size_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (size_t part = 0; part < kParts; ++part)
      sum[r][part] = load(p.from + r * p.from_stride + part * kOrderColumns);
  const int8_t *w = p.panel, *ahead = p.ahead;
  for (size_t i = 0; i < p.steps; ++i, w += 4 * kPanel, ahead += p.ahead_step) {
    _mm_prefetch(ahead, _MM_HINT_T1);
    _mm_prefetch(ahead + 64, _MM_HINT_T1);
    __m256i x[rows][2];
#pragma GCC unroll 2
    for (size_t r = 0; r < rows; ++r) {
      const __m256i bytes = four(p.x + r * p.stride + 4 * i);
      x[r][0] = _mm256_and_si256(bytes, low);
      x[r][1] = _mm256_srli_epi16(bytes, 8);
    }
#pragma GCC unroll 4
    for (size_t part = 0; part < kParts; ++part) {
      const __m256i columns = load(w + 32 * part);
      const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(columns, 8), 8), odd = _mm256_srai_epi16(columns, 8);
#pragma GCC unroll 2
      for (size_t r = 0; r < rows; ++r) {
        add32(sum[r][part], _mm256_madd_epi16(x[r][0], even));
        add32(sum[r][part], _mm256_madd_epi16(x[r][1], odd));
      }
    }
  }
#pragma GCC unroll 2
  for (size_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (size_t part = 0; part < kParts; ++part) store(p.sums + r * kPanel + part * kOrderColumns, sum[r][part]);
}

struct V : Lanes {
  static constexpr size_t kRows = 10;

  static void product(size_t rows, const Product& p) {
    static void (*const all[kRows])(const Product&) = {few_rows<1>, few_rows<2>, product_of<3>, product_of<4>,
                                                       product_of<5>, product_of<6>, product_of<7>, product_of<8>,
                                                       product_of<9>, product_of<10>};
    all[rows - 1](p);
  }
};

#include "quant_linear_body.inc"
#include "quant_conv_body.inc"

struct W : Shorts {
  static constexpr size_t kRows = 3, kBlock = 6;

  template <size_t rows>
  static void product_of(const Product& p) {
    __m256i sum[rows][4] = {};
    const int8_t *w = p.panel, *ahead = p.ahead;
    for (size_t i = 0; i < p.steps; ++i, w += 4 * kPanel, ahead += p.ahead_step) {
      _mm_prefetch(ahead, _MM_HINT_T1);
      _mm_prefetch(ahead + 64, _MM_HINT_T1);
#pragma GCC unroll 3
      for (size_t r = 0; r < rows; ++r) {
        int32_t two;
        std::memcpy(&two, p.x + r * p.stride + 4 * i, sizeof two);
        const __m256i x = _mm256_set1_epi32(two);
#pragma GCC unroll 4
        for (size_t c = 0; c < 4; ++c)
          sum[r][c] = dot(sum[r][c], x, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w) + c));
      }
    }
#pragma GCC unroll 3
    for (size_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (size_t c = 0; c < 4; ++c) store32(p.sums + r * kPanel + 8 * c, sum[r][c]);
  }
  static void product(size_t rows, const Product& p) {
    rows == 1 ? product_of<1>(p) : rows == 2 ? product_of<2>(p) : product_of<3>(p);
  }
};

#include "quant_conv_tiles_body.inc"

}  // namespace

void quant_conv_avx2(const ConvWork& work, const ConvPart& part) { conv<10>(work, part, sum_tile); }

void quant_conv_tiles_avx2(const ConvWork& work, const ConvTilesPart& part) { conv_tiles(work, part); }

void quant_linear_avx2(const LinearWork& work, size_t first, size_t last) { linear(work, first, last); }

int32_t int8_peak_avx2(size_t rounds) {  // couples
  __m256i sum[8], x = _mm256_set1_epi8(3), w = _mm256_set1_epi8(-5);
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 8
  for (auto& s : sum) s = _mm256_setzero_si256();
  for (size_t i = 0; i < 3 * rounds; ++i) {  // 3 x 8 x 64 products
#pragma GCC unroll 8
    for (auto& s : sum) {
      asm("" : "+x"(x), "+x"(w));  // without it the compiler computes one product
      const __m256i first = _mm256_maddubs_epi16(x, w);
      asm("" : "+x"(x), "+x"(w));
      add32(s, _mm256_madd_epi16(_mm256_add_epi16(first, _mm256_maddubs_epi16(x, w)), ones));
    }
  }
#pragma GCC unroll 8
  for (size_t k = 1; k < 8; ++k) sum[0] = _mm256_xor_si256(sum[0], sum[k]);
  return _mm256_extract_epi32(sum[0], 0);
}

}  // namespace calmclip
