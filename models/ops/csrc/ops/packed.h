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

// Of `bytes` packed weights: memory with the same numbers, if another node has packed them, which `fresh` then leaves
// free; else `fresh`. Graphs of one bundle may have one tower, and so may a bundle and the one that replaces it. Packed
// weights do not change any more.
Packed once(const Packed& fresh, size_t bytes);

struct Loan;

// Lives as long as a node that has packed the constant weight at `weight`, and reads it no more. See calmclip_lend.
class Spent {
 public:
  explicit Spent(const void* weight);
  ~Spent();
  Spent(const Spent&) = delete;
  Spent& operator=(const Spent&) = delete;

 private:
  const void* weight_;
  std::shared_ptr<Loan> loan_;  // null if the memory is not lent
};

}  // namespace calmclip
