// What compilers refer to in newer C and C++ libraries, so that this library loads with those of 2018: glibc 2.28, gcc 8.
#include <cstddef>

#if defined(__GLIBC__)
#include <cxxabi.h>

#include <exception>
#include <new>
#include <string>

#define HIDDEN __attribute__((visibility("hidden")))

// glibc 2.32: whether the process has one thread, so that libstdc++ need not count a shared_ptr's owners atomically.
extern HIDDEN char single_threaded __asm__("__libc_single_threaded");
char single_threaded = 0;

// gcc 14: an exception would leave a function that is noexcept.
HIDDEN void call_terminate(void* exception) __asm__("__cxa_call_terminate");
void call_terminate(void* exception) {
  __cxxabiv1::__cxa_begin_catch(exception);
  std::terminate();
}

// gcc 11: std::__throw_bad_array_new_length.
HIDDEN void throw_bad_array_new_length() __asm__("_ZSt28__throw_bad_array_new_lengthv");
void throw_bad_array_new_length() { throw std::bad_array_new_length(); }

// gcc 13: a part of std::string that its headers leave to libstdc++.
#if _GLIBCXX_RELEASE >= 13
template void std::string::_M_replace_cold(char*, size_type, const char*, const size_type, const size_type);
#endif
#endif
