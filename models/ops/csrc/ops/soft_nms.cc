// Greedy suppression that decays the scores of overlapping boxes, for one image or many.
// Source: Bodla et al. 2017 (arXiv 1704.04503), section 3.
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>

#include "../kernels/dispatch.h"
#include "op.h"

namespace calmclip {
namespace {

enum Input { kBoxes, kScores, kClasses, kMethod, kPerClass, kThreshold, kSigma, kMinScore, kMaxOutput };
constexpr const char* kNames[] = {"boxes",         "scores", "classes",   "method",    "per_class",
                                  "iou_threshold", "sigma",  "min_score", "max_output"};

[[noreturn]] void invalid(const std::string& message) {
  throw Ort::Exception("SoftNMS: " + message, ORT_INVALID_ARGUMENT);
}

struct Settings {
  int method, per_class;
  float threshold, sigma, min_score;
  size_t max_output;
};

std::vector<int64_t> shape_of(Ort::KernelContext& context, Input which) {
  return context.GetInput(which).GetTensorTypeAndShapeInfo().GetShape();
}

template <class T>
T setting(Ort::KernelContext& context, Input which) {
  const auto input = context.GetInput(which);
  const auto info = input.GetTensorTypeAndShapeInfo();
  const auto shape = info.GetShape();
  if (shape.size() > 1 || info.GetElementCount() != 1)
    invalid(std::string(kNames[which]) + " has the shape " + text(shape) + "; expected [1]");
  return *input.GetTensorData<T>();
}

Settings settings_of(Ort::KernelContext& context) {
  const auto method = setting<int64_t>(context, kMethod), per_class = setting<int64_t>(context, kPerClass);
  const auto max_output = setting<int64_t>(context, kMaxOutput);
  const auto threshold = setting<float>(context, kThreshold), sigma = setting<float>(context, kSigma);
  const auto min_score = setting<float>(context, kMinScore);
  if (method < 0 || method > 2)
    invalid("method is " + std::to_string(method) + "; expected 0 (hard), 1 (linear) or 2 (gaussian)");
  if (per_class != 0 && per_class != 1) invalid("per_class is " + std::to_string(per_class) + "; expected 0 or 1");
  if (std::isnan(threshold)) invalid("iou_threshold is NaN; expected a number");
  if (!(sigma > 0)) invalid("sigma is " + std::to_string(sigma) + "; expected more than 0");
  if (std::isnan(min_score)) invalid("min_score is NaN; expected a number");
  if (max_output < 0) invalid("max_output is " + std::to_string(max_output) + "; expected 0 or more");
  return {static_cast<int>(method), static_cast<int>(per_class), threshold, sigma, min_score,
          static_cast<size_t>(max_output)};
}

class SoftNmsKernel {
 public:
  explicit SoftNmsKernel(Ort::ConstKernelInfo) {}

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&]() -> OrtStatusPtr {
      Ort::KernelContext context(raw);
      const Settings how = settings_of(context);
      const auto shape = shape_of(context, kBoxes);
      if ((shape.size() != 2 && shape.size() != 3) || shape.back() != 4)
        invalid("boxes has the shape " + text(shape) + "; expected [N, 4] or [B, N, 4]");
      const std::vector<int64_t> rows(shape.begin(), shape.end() - 1);
      for (const Input which : {kScores, kClasses})
        if (const auto actual = shape_of(context, which); actual != rows)
          invalid(std::string(kNames[which]) + " has the shape " + text(actual) + "; expected " + text(rows) +
                  ", for boxes has the shape " + text(shape));
      const auto n = static_cast<size_t>(rows.back());
      // without boxes the number of images is unbounded, because it takes no memory
      const auto images = n == 0 ? size_t{0} : static_cast<size_t>(rows.size() == 2 ? rows[0] : 1);
      if (images && n > static_cast<size_t>(std::numeric_limits<int32_t>::max()) - 64)
        invalid("there are " + std::to_string(n) + " boxes in an image; expected fewer than 2^31 - 64");

      const float* boxes = context.GetInput(kBoxes).GetTensorData<float>();
      const float* scores = context.GetInput(kScores).GetTensorData<float>();
      const int64_t* classes = context.GetInput(kClasses).GetTensorData<int64_t>();
      // boxes exist in memory, so images * n does not overflow
      for (size_t i = 0; i < images * n; ++i)
        if (std::isnan(scores[i]))
          invalid("score " + std::to_string(i % n) + (rows.size() == 2 ? " of image " + std::to_string(i / n) : "") +
                  " is NaN; expected numbers");

      const size_t most = std::min(n, how.max_output);
      const auto kept = std::make_unique_for_overwrite<int64_t[]>(images * most);
      const auto kept_scores = std::make_unique_for_overwrite<float[]>(images * most);
      std::vector<size_t> counts(images);
      std::atomic<bool> starved = false;  // an exception on a thread of the pool would end the process
      const size_t grain = 1 + 4096 / std::max<size_t>(n, 1);
      spread(context, images, grain, [&](size_t first, size_t last) noexcept {
        for (size_t b = first; b < last; ++b) try {
            counts[b] = kernels().soft_nms_image(boxes + b * n * 4, scores + b * n, classes + b * n, n, how.method,
                                                 how.per_class, how.threshold, how.sigma, how.min_score, most,
                                                 kept.get() + b * most, kept_scores.get() + b * most);
          } catch (...) {
            starved = true;
          }
      });
      if (starved) throw std::bad_alloc();

      size_t total = 0;
      for (const size_t count : counts) total += count;
      const std::vector<int64_t> length{static_cast<int64_t>(total)};
      int64_t* indices = context.GetOutput(0, length).GetTensorMutableData<int64_t>();
      float* decayed = context.GetOutput(1, length).GetTensorMutableData<float>();
      int64_t* labels = context.GetOutput(2, length).GetTensorMutableData<int64_t>();
      int64_t* batch = context.GetOutput(3, length).GetTensorMutableData<int64_t>();
      for (size_t b = 0; b < images; ++b)
        for (size_t k = 0; k < counts[b]; ++k) {
          const int64_t index = kept[b * most + k];
          *indices++ = index;
          *decayed++ = kept_scores[b * most + k];
          *labels++ = classes[b * n + static_cast<size_t>(index)];
          *batch++ = static_cast<int64_t>(b);
        }
      return nullptr;
    });
  }
};

struct Schema : Op<Schema, SoftNmsKernel> {
  static constexpr const char* kOpName = "SoftNMS";
  static constexpr Type kInputTypes[] = {kFloat, kFloat, kInt64, kInt64, kInt64, kFloat, kFloat, kFloat, kInt64};
  static constexpr Type kOutputTypes[] = {kInt64, kFloat, kInt64, kInt64};
};

}  // namespace

DEFINE_OP(soft_nms, Schema)

}  // namespace calmclip
