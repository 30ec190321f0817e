#include "dispatch.h"

#include <cstring>
#include <string>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace calmclip {
namespace {

#if defined(__aarch64__) && defined(__linux__)
bool dotprod() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }
bool i8mm() { return getauxval(AT_HWCAP2) & HWCAP2_I8MM; }
#elif defined(__aarch64__) && defined(__APPLE__)
bool feature(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
}
bool dotprod() { return feature("hw.optional.arm.FEAT_DotProd"); }
bool i8mm() { return feature("hw.optional.arm.FEAT_I8MM"); }
#elif defined(__aarch64__)
bool dotprod() { return false; }
bool i8mm() { return false; }
#endif

// These features must match the flags of the same instruction sets in build.py.
bool on_processor(const char* isa) {
  if (std::strcmp(isa, "scalar") == 0) return true;
#if defined(__x86_64__)
  if (std::strcmp(isa, "avx2") == 0) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (std::strcmp(isa, "avx512") == 0)
    return on_processor("avx2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (std::strcmp(isa, "vnni") == 0) return on_processor("avx512") && __builtin_cpu_supports("avx512vnni");
#if defined(CALMCLIP_AVXVNNI_IN_C)  // build.EMULATED
  if (std::strcmp(isa, "avxvnni") == 0) return on_processor("avx2");
#else
  if (std::strcmp(isa, "avxvnni") == 0) return on_processor("avx2") && __builtin_cpu_supports("avxvnni");
#endif
  if (std::strcmp(isa, "vbmi") == 0) return on_processor("avx512") && __builtin_cpu_supports("avx512vbmi");
#elif defined(__aarch64__)
  if (std::strcmp(isa, "neon") == 0) return true;  // part of the base architecture
  if (std::strcmp(isa, "dotprod") == 0) return dotprod();
  if (std::strcmp(isa, "i8mm") == 0) return dotprod() && i8mm();
#endif
  return false;
}

std::string& masked() {  // names between commas
  static std::string names = ",";
  return names;
}

bool has(const char* isa) {
  if (std::strcmp(isa, "scalar") == 0) return true;
  return on_processor(isa) && masked().find("," + std::string(isa) + ",") == std::string::npos;
}

const calmclip_kernel* all(size_t* count) {
  static calmclip_kernel list[] = {
#define LINE(name, type, isa) {#name, #isa, reinterpret_cast<void (*)()>(&name##_##isa), 0},
#define KERNEL(name, type) FOR_EACH_ISA(LINE, name, type)
#define INT8_KERNEL(name, type) FOR_EACH_INT8_ISA(LINE, name, type)
#define BYTE_KERNEL(name, type) FOR_EACH_BYTE_ISA(LINE, name, type)
#define TABLE_KERNEL(name, type) FOR_EACH_TABLE_ISA(LINE, name, type)
#include "list.inc"
#undef TABLE_KERNEL
#undef BYTE_KERNEL
#undef INT8_KERNEL
#undef KERNEL
#undef LINE
  };
  *count = sizeof list / sizeof *list;
  for (calmclip_kernel& line : list) line.runs = has(line.isa);
  return list;
}

Kernels choose() {
  Kernels best{};
#define TAKE(name, type, isa) \
  if (has(#isa)) best.name = name##_##isa;
#define KERNEL(name, type) FOR_EACH_ISA(TAKE, name, type)
#define INT8_KERNEL(name, type) FOR_EACH_INT8_ISA(TAKE, name, type)
#define BYTE_KERNEL(name, type) FOR_EACH_BYTE_ISA(TAKE, name, type)
#define TABLE_KERNEL(name, type) FOR_EACH_TABLE_ISA(TAKE, name, type)
#include "list.inc"
#undef TABLE_KERNEL
#undef BYTE_KERNEL
#undef INT8_KERNEL
#undef KERNEL
#undef TAKE
  return best;
}

Kernels& best() {
  static Kernels kernels = choose();
  return kernels;
}

}  // namespace

const Kernels& kernels() { return best(); }

bool reads_order() {
#if defined(__x86_64__)
  return kernels().quant_linear == quant_linear_avx2;
#else
  return false;
#endif
}

}  // namespace calmclip

// For `calmclip ops info`, tests and benchmarks: all kernels; `count` is their number.
extern "C" __attribute__((visibility("default"))) const calmclip::calmclip_kernel* calmclip_kernels(size_t* count) {
  return calmclip::all(count);
}

// Dispatch no longer takes the instruction sets with these names, which stand between commas; "" takes all again. Not
// while a kernel runs on another thread. Scalar kernels are never masked.
extern "C" __attribute__((visibility("default"))) void calmclip_mask(const char* isas) {
  calmclip::masked() = "," + std::string(isas) + ",";
  calmclip::best() = calmclip::choose();
}
