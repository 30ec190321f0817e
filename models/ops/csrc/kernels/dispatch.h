// The list of kernels, and the choice among them for this processor.
#pragma once

#include <cstddef>

#include "quant_add.h"
#include "quant_attention.h"
#include "quant_conv.h"
#include "quant_depthwise.h"
#include "quant_linear.h"
#include "quant_lookup.h"
#include "quant_max_pool.h"
#include "quant_rows.h"
#include "resize.h"
#include "rotary_attention.h"
#include "soft_nms.h"
#include "softmax_rows.h"

// In rising order: dispatch takes the last instruction set that the processor has. `build.ISAS` is the same table.
// Kernels of bytes and byte tables name the part of AVX-512 that they need: VNNI and VBMI.
#if defined(__x86_64__)
#define FOR_EACH_ISA(X, name, type) X(name, type, scalar) X(name, type, avx2) X(name, type, avx512)
#define FOR_EACH_INT8_ISA(X, name, type) \
  X(name, type, scalar) X(name, type, avx2) X(name, type, avxvnni) X(name, type, vnni)
#define FOR_EACH_BYTE_ISA(X, name, type) X(name, type, scalar) X(name, type, avx2) X(name, type, vnni)
#define FOR_EACH_TABLE_ISA(X, name, type) X(name, type, scalar) X(name, type, avx2) X(name, type, vbmi)
#elif defined(__aarch64__)
#define FOR_EACH_ISA(X, name, type) X(name, type, scalar) X(name, type, neon)
#define FOR_EACH_INT8_ISA(X, name, type) \
  X(name, type, scalar) X(name, type, neon) X(name, type, dotprod) X(name, type, i8mm)
#define FOR_EACH_BYTE_ISA(X, name, type) X(name, type, scalar) X(name, type, neon)
#define FOR_EACH_TABLE_ISA(X, name, type) X(name, type, scalar) X(name, type, neon)
#else
#define FOR_EACH_ISA(X, name, type) X(name, type, scalar)
#define FOR_EACH_INT8_ISA FOR_EACH_ISA
#define FOR_EACH_BYTE_ISA FOR_EACH_ISA
#define FOR_EACH_TABLE_ISA FOR_EACH_ISA
#endif

namespace calmclip {

#define DECLARE(name, type, isa) extern "C" type name##_##isa;
#define KERNEL(name, type) FOR_EACH_ISA(DECLARE, name, type)
#define INT8_KERNEL(name, type) FOR_EACH_INT8_ISA(DECLARE, name, type)
#define BYTE_KERNEL(name, type) FOR_EACH_BYTE_ISA(DECLARE, name, type)
#define TABLE_KERNEL(name, type) FOR_EACH_TABLE_ISA(DECLARE, name, type)
#include "list.inc"
#undef TABLE_KERNEL
#undef BYTE_KERNEL
#undef INT8_KERNEL
#undef KERNEL
#undef DECLARE

// The fastest version of each kernel that this processor can run and that `calmclip_mask` left.
struct Kernels {
#define KERNEL(name, type) type* name;
#define INT8_KERNEL KERNEL
#define BYTE_KERNEL KERNEL
#define TABLE_KERNEL KERNEL
#include "list.inc"
#undef TABLE_KERNEL
#undef BYTE_KERNEL
#undef INT8_KERNEL
#undef KERNEL
};
const Kernels& kernels();

// Whether the chosen quant_linear reads LinearWork::order.
bool reads_order();

// One row of the list, as other languages see it. `runs`: whether this processor has the instructions, and
// `calmclip_mask` left them.
extern "C" struct calmclip_kernel {
  const char* name;
  const char* isa;
  void (*function)();
  int runs;
};

}  // namespace calmclip
