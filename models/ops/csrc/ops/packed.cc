#include "packed.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace calmclip {

// Memory that holds weights, and for each address the living nodes that have packed the weight there.
struct Loan {
  uintptr_t begin, end;
  std::map<const void*, size_t> nodes;

  bool holds(const void* address) const {
    const auto at = reinterpret_cast<uintptr_t>(address);
    return begin <= at && at < end;
  }
};

namespace {

constexpr size_t kHuge = 2 << 20;  // a huge page
constexpr size_t kPiece = 32 << 20;
constexpr size_t kLine = 128;

std::mutex guard;
std::weak_ptr<int8_t> piece;  // the last one; it expires when all packed weights in it are gone
size_t taken, size;

struct Known {
  std::weak_ptr<int8_t> place;  // expires with its piece, in which no place is used twice
  size_t bytes;
};

std::multimap<uint64_t, Known> known;  // packed weights, by `hash`
std::vector<std::shared_ptr<Loan>> loans;

// Of FNV-1a, but of eight bytes at once: equal numbers have it, and others almost never. What has it is compared.
uint64_t hash(const int8_t* at, size_t bytes) {
  uint64_t sum = 14695981039346656037u ^ bytes;
  for (; bytes >= sizeof sum; at += sizeof sum, bytes -= sizeof sum) {
    uint64_t word;
    std::memcpy(&word, at, sizeof word);
    sum = (sum ^ word) * 1099511628211u;
    sum ^= sum >> 29;
  }
  for (; bytes > 0; ++at, --bytes) sum = (sum ^ static_cast<uint8_t>(*at)) * 1099511628211u;
  return sum;
}

std::shared_ptr<Loan> loan_of(const void* address) {
  const auto at = std::find_if(loans.begin(), loans.end(), [&](const auto& loan) { return loan->holds(address); });
  return at == loans.end() ? nullptr : *at;
}

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
    std::erase_if(known, [](const auto& entry) { return entry.second.place.expired(); });
  }
  const Packed place(in, in.get() + taken);
  taken += up(bytes, kLine);
  return place;
}

Packed once(const Packed& fresh, size_t bytes) {
  const uint64_t key = hash(fresh.get(), bytes);
  const std::lock_guard lock(guard);
  const auto [first, last] = known.equal_range(key);
  for (auto at = first; at != last; ++at) {
    const Packed other = at->second.place.lock();
    if (!other || at->second.bytes != bytes || std::memcmp(other.get(), fresh.get(), bytes)) continue;
    const auto in = piece.lock();
    if (in && in.get() + taken == fresh.get() + up(bytes, kLine)) taken -= up(bytes, kLine);  // it is the last place
    return other;
  }
  known.insert({key, {fresh, bytes}});
  return fresh;
}

Spent::Spent(const void* weight) : weight_(weight) {
  const std::lock_guard lock(guard);
  loan_ = loan_of(weight);
  if (loan_) ++loan_->nodes[weight];
}

Spent::~Spent() {
  const std::lock_guard lock(guard);
  if (loan_) --loan_->nodes[weight_];
}

}  // namespace calmclip

// The `size` bytes from `memory` hold weights of a graph. Until calmclip_unlend, the nodes that pack them are counted.
extern "C" __attribute__((visibility("default"))) void calmclip_lend(const void* memory, size_t size) {
  const std::lock_guard lock(calmclip::guard);
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  calmclip::loans.push_back(std::make_shared<calmclip::Loan>(calmclip::Loan{begin, begin + size, {}}));
}

// The living nodes that have packed the weight at this address of memory that is lent, and read it no more.
extern "C" __attribute__((visibility("default"))) size_t calmclip_packed(const void* weight) {
  const std::lock_guard lock(calmclip::guard);
  const auto loan = calmclip::loan_of(weight);
  return loan && loan->nodes.count(weight) ? loan->nodes[weight] : 0;
}

extern "C" __attribute__((visibility("default"))) void calmclip_unlend(const void* memory) {
  const std::lock_guard lock(calmclip::guard);
  std::erase_if(calmclip::loans, [&](const auto& loan) { return loan->holds(memory); });
}
