// The form of softmax_rows.h for rows of `cols` in a tensor of a given size in bytes, read and written: one table.
//
// Measured 2026-11 with `python -m tests.bench.ops_softmax`, ns an element, one thread, AVX-512; form + s: streams.
//
//   rows x cols          reload   two_pass   two_pass + s   recompute + s   ONNX Runtime
//   Intel server core, 2 MiB L2, a very large L3 that many share
//   512 x 1000    4 MB    0.33      0.41        0.69           0.72            0.38
//   128 x 8192    8 MB    0.39      0.39        0.72           0.84            0.51
//   1 x 1M        8 MB    0.74      0.51        0.74           0.90            0.71
//   1 x 4M       32 MB    0.92      0.52        0.98           1.18            1.12
//   2048 x 8192 134 MB    0.67      0.84        0.68           0.63            0.85
//   1 x 16M     128 MB    1.90      1.78        1.24           1.59            2.14
//   1 x 64M     512 MB    1.21      1.72        0.93           1.21            1.59
//   110000 x 577  0.5 GB  0.95      1.20        1.51           1.33            0.93
//   Zen 4 core, 1 MiB L2, 32 MiB L3
//   2364 x 197    4 MB    0.34      0.47          -              -             0.39
//   128 x 8192    8 MB    0.26      0.35          -              -             0.31
//   1 x 1M        8 MB    0.28      0.38          -              -             0.32
//   16 x 1M     128 MB    0.42      0.38          -              -             0.45
//   1 x 64M     512 MB    0.56      0.43        0.36           0.48            0.63
//
// So the table takes reload if the caches hold what the later passes read again, and for short rows, which always fit.
// It takes two_pass otherwise. two_pass wins within an L3 that is slow (1M, 4M above) and loses within a fast L3, hence
// the limit at half of it. Streaming stores win only if the caches do not hold the output.
#pragma once

#include <unistd.h>

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "dispatch.h"

namespace calmclip {

struct SoftmaxForm {
  size_t cols;    // rows of at most this many
  double caches;  // tensors of at most this many times the last-level cache
  SoftmaxRows* Kernels::*rows;
  bool stream;
};

inline constexpr SoftmaxForm kSoftmaxForms[] = {  // the first row that matches
    {4095, HUGE_VAL, &Kernels::softmax_reload, false},
    {SIZE_MAX, 0.5, &Kernels::softmax_reload, false},
    {262143, 1, &Kernels::softmax_reload, false},  // a row, read and written, fits an L2 of 2 MiB
    {SIZE_MAX, 1, &Kernels::softmax_two_pass, false},
    {SIZE_MAX, HUGE_VAL, &Kernels::softmax_two_pass, true},
};

// Bytes of the last-level cache. More than 64 MiB belongs to a server and is shared with other tenants, so 64 MiB
// counts then (1 x 16M above streams with gain beside an L3 of 480 MiB). 16 MiB if the system does not report it.
inline double last_level() {
  static const double bytes = [] {
#ifdef _SC_LEVEL3_CACHE_SIZE
    const long reported = sysconf(_SC_LEVEL3_CACHE_SIZE);
#else
    const long reported = 0;
#endif
    const long known = reported > 0 ? reported : 16L << 20;
    return static_cast<double>(known < 64L << 20 ? known : 64L << 20);
  }();
  return bytes;
}

inline const SoftmaxForm& softmax_form(size_t cols, double bytes) {
  const SoftmaxForm* form = kSoftmaxForms;
  while (cols > form->cols || bytes > form->caches * last_level()) ++form;
  return *form;
}

}  // namespace calmclip
