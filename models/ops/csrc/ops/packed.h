// Where packed weights live: one node's behind the other's, in large pieces of huge pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace calmclip {

// Keeps its piece as long as anything in it is kept.
using Packed = std::shared_ptr<int8_t>;

// `bytes` of memory from a cache line on; throws std::bad_alloc. Those that are asked for one after the other lie so, and
// nodes are made in the order in which they run: what a kernel asks for beyond its last panel is the next one's first.
Packed packed(size_t bytes);

}  // namespace calmclip
