#include "packed.h"

#include <cstdlib>
#include <mutex>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace calmclip {
namespace {

constexpr size_t kHuge = 2 << 20;  // a huge page
constexpr size_t kPiece = 32 << 20;
constexpr size_t kLine = 64;

std::mutex guard;
std::weak_ptr<int8_t> piece;  // the last one; it expires when all packed weights in it are gone
size_t taken, size;

size_t up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

}  // namespace

Packed packed(size_t bytes) {
  const std::lock_guard lock(guard);
  auto in = piece.lock();
  if (!in || size - taken < bytes) {
    size = up(bytes < kPiece ? kPiece : bytes, kHuge);
    void* memory = std::aligned_alloc(kHuge, size);
    if (!memory) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(memory, size, MADV_HUGEPAGE);  // a hint; with pages of 4 kB a stream of weights is a tenth slower
#endif
    in = Packed(static_cast<int8_t*>(memory), std::free);
    piece = in;
    taken = 0;
  }
  const Packed place(in, in.get() + taken);
  taken += up(bytes, kLine);
  return place;
}

}  // namespace calmclip
