// Fetching the rows to come, for the vector kernels of ResizeRows. A copy in every file that includes it: each is
// compiled for other instructions.
#pragma once

#include <cstddef>
#include <cstdint>

namespace calmclip {
namespace {

// Of a row, in bytes: after so many the processor sees by itself where it is going.
constexpr size_t kAhead = 2048;

// Asks for a share of the next rows at each group of columns, in the background of the sums.
struct Ahead {
  const uint8_t* const* row;
  const uint8_t* const* end;
  size_t bytes, at, share;  // of a row; of it asked for; lines a group

  void fetch() {
    for (size_t k = 0; k < share && row != end; ++k) {
      __builtin_prefetch(*row + at, 0, 2);
      at += 64;
      if (at >= bytes) at = 0, ++row;
    }
  }
};

}  // namespace

}  // namespace calmclip
