// Memory for packed weights: those of one node after those of another, in large pieces of huge pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace calmclip {

// Keeps its whole piece alive.
using Packed = std::shared_ptr<int8_t>;

// `bytes` of memory, aligned to a cache line; throws std::bad_alloc. Consecutive calls return adjacent memory. Nodes
// are constructed in the order in which they run, so a prefetch past the last panel of a node reads the first panel of
// the next node.
Packed packed(size_t bytes);

}  // namespace calmclip
