// Which kernels there are, and which this processor gets.
#pragma once

#include <cstddef>

#include "resize.h"
#include "soft_nms.h"
#include "softmax_rows.h"

// In rising order: the last one that a processor has is taken.
#if defined(__x86_64__)
#define FOR_EACH_ISA(X, name, type) X(name, type, scalar) X(name, type, avx2) X(name, type, avx512)
#elif defined(__aarch64__)
#define FOR_EACH_ISA(X, name, type) X(name, type, scalar) X(name, type, neon)
#else
#define FOR_EACH_ISA(X, name, type) X(name, type, scalar)
#endif

namespace calmclip {

#define DECLARE(name, type, isa) extern "C" type name##_##isa;
#define KERNEL(name, type) FOR_EACH_ISA(DECLARE, name, type)
#include "list.inc"
#undef KERNEL
#undef DECLARE

// The fastest form of each kernel that this processor runs; asked once.
struct Kernels {
#define KERNEL(name, type) type* name;
#include "list.inc"
#undef KERNEL
};
const Kernels& kernels();

// One line of the list as the outside sees it. `runs`: whether this processor has the instructions.
extern "C" struct calmclip_kernel {
  const char* name;
  const char* isa;
  void (*function)();
  int runs;
};

}  // namespace calmclip
