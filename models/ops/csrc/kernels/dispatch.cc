#include "dispatch.h"

#include <cstring>

namespace calmclip {
namespace {

// These features must match the flags of the same instruction sets in build.py.
bool has(const char* isa) {
  if (std::strcmp(isa, "scalar") == 0) return true;
#if defined(__x86_64__)
  if (std::strcmp(isa, "avx2") == 0) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (std::strcmp(isa, "avx512") == 0)
    return has("avx2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (std::strcmp(isa, "vnni") == 0) return has("avx512") && __builtin_cpu_supports("avx512vnni");
  if (std::strcmp(isa, "vbmi") == 0) return has("avx512") && __builtin_cpu_supports("avx512vbmi");
#elif defined(__aarch64__)
  if (std::strcmp(isa, "neon") == 0) return true;  // part of the base architecture
#endif
  return false;
}

const calmclip_kernel* all(size_t* count) {
  static const calmclip_kernel list[] = {
#define LINE(name, type, isa) {#name, #isa, reinterpret_cast<void (*)()>(&name##_##isa), has(#isa)},
#define KERNEL(name, type) FOR_EACH_ISA(LINE, name, type)
#define INT8_KERNEL(name, type) FOR_EACH_INT8_ISA(LINE, name, type)
#define TABLE_KERNEL(name, type) FOR_EACH_TABLE_ISA(LINE, name, type)
#include "list.inc"
#undef TABLE_KERNEL
#undef INT8_KERNEL
#undef KERNEL
#undef LINE
  };
  *count = sizeof list / sizeof *list;
  return list;
}

Kernels choose() {
  Kernels best{};
#define TAKE(name, type, isa) \
  if (has(#isa)) best.name = name##_##isa;
#define KERNEL(name, type) FOR_EACH_ISA(TAKE, name, type)
#define INT8_KERNEL(name, type) FOR_EACH_INT8_ISA(TAKE, name, type)
#define TABLE_KERNEL(name, type) FOR_EACH_TABLE_ISA(TAKE, name, type)
#include "list.inc"
#undef TABLE_KERNEL
#undef INT8_KERNEL
#undef KERNEL
#undef TAKE
  return best;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels best = choose();
  return best;
}

}  // namespace calmclip

// For `calmclip ops info`, tests and benchmarks: all kernels; `count` is their number.
extern "C" __attribute__((visibility("default"))) const calmclip::calmclip_kernel* calmclip_kernels(size_t* count) {
  return calmclip::all(count);
}
