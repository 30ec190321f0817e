// A picture, uint8 [H, W, 3] -> the input of a graph, [1, 3, h, w]: resized as Pillow does it, cropped or padded,
// normalized. The geometry is that of models/preprocess/image.py.
//
// There are two operators, ImageToPixels (float32) and ImageToQuantizedPixels (uint8). The type of an output must
// follow from the types of the inputs, both for ONNX Runtime's choice among kernels of one name and for a function
// body, and here both take uint8.
#include "../kernels/image_to_pixels.h"

#include <atomic>
#include <cmath>

#include "../kernels/dispatch.h"
#include "op.h"

namespace calmclip {
namespace {

constexpr const char* kName[2] = {"ImageToPixels", "ImageToQuantizedPixels"};

class Settings {
 public:
  Settings(Ort::ConstKernelInfo info, bool quantized) : name_(kName[quantized]) {
    const auto size = list<int64_t>(info, "size");
    const auto gain = list<float>(info, "gain"), bias = list<float>(info, "bias");
    const auto resize = scalar<std::string>(info, "resize"), resample = scalar<std::string>(info, "resample");
    const auto crop_offset = scalar<std::string>(info, "crop_offset");
    const auto shortest = scalar<int64_t>(info, "shortest"), pad = scalar<int64_t>(info, "pad");
    keep_square_ = scalar<int64_t>(info, "keep_square") != 0;

    constexpr auto most = static_cast<int64_t>(kMaxInput);
    if (size.size() != 2) refuse_("size has " + std::to_string(size.size()) + " numbers; expected height and width");
    if (std::min(size[0], size[1]) < 1 || std::max(size[0], size[1]) > most)
      refuse_("size is " + text(size) + "; expected sides within 1 to " + std::to_string(most));
    resize_ = choice("resize", resize, {"shortest", "exact", "letterbox"});
    crop_floor_ = choice("crop_offset", crop_offset, {"round", "floor"}) == 1;
    filter_ = choice("resample", resample, {"bilinear", "bicubic"}) ? Filter::bicubic : Filter::bilinear;
    if (resize_ == 0 && (shortest < std::max(size[0], size[1]) || shortest > most))
      refuse_("shortest is " + std::to_string(shortest) + "; expected the larger of size " + text(size) + " to " +
              std::to_string(most));
    if (pad < 0 || pad > 255) refuse_("pad is " + std::to_string(pad) + "; expected 0 to 255");
    if (gain.size() != 3 || bias.size() != 3)
      refuse_("gain has " + std::to_string(gain.size()) + " numbers and bias " + std::to_string(bias.size()) +
              "; expected 3 each");
    for (size_t c = 0; c < 3; ++c) {
      if (!std::isfinite(gain[c]) || !std::isfinite(bias[c]))
        refuse_("gain is " + std::to_string(gain[c]) + " and bias " + std::to_string(bias[c]) + " of channel " +
                std::to_string(c) + "; expected finite numbers");
      gain_[c] = gain[c];
      bias_[c] = bias[c];
    }
    rows_ = static_cast<size_t>(size[0]);
    columns_ = static_cast<size_t>(size[1]);
    shortest_ = static_cast<size_t>(std::max<int64_t>(shortest, 0));
    pad_ = static_cast<uint8_t>(pad);
    if (!quantized) return;

    const auto scale = scalar<float>(info, "scale");
    const auto zero_point = scalar<int64_t>(info, "zero_point");
    if (!std::isfinite(scale) || !(scale > 0))
      refuse_("scale is " + std::to_string(scale) + "; expected a finite number over 0");
    if (zero_point < 0 || zero_point > 255)
      refuse_("zero_point is " + std::to_string(zero_point) + "; expected 0 to 255");
    for (size_t c = 0; c < 3; ++c)
      for (int byte = 0; byte < 256; ++byte) {
        float value = static_cast<float>(byte) * gain_[c];
        value += bias_[c];
        const float q = std::nearbyint(value / scale) + static_cast<float>(zero_point);
        table_[c][byte] = static_cast<uint8_t>(q < 0 ? 0 : q > 255 ? 255 : q);
      }
  }

  // Computes the output from a picture of any size.
  std::vector<int64_t> shape() const { return {1, 3, static_cast<int64_t>(rows_), static_cast<int64_t>(columns_)}; }

  OrtStatusPtr compute(Ort::KernelContext& context, float* values, uint8_t* bytes) const {
    const auto input = context.GetInput(0);
    const auto shape = input.GetTensorTypeAndShapeInfo().GetShape();
    const auto picture = Picture{input.GetTensorData<uint8_t>(), size(shape[0]), size(shape[1]), size(shape[1]) * 3, 3,
                                 0, size(shape[0])};
    const Placement placement = place(picture.height, picture.width);
    if (const char* what = ImageToPixels::check(picture, placement)) return refuse(name_ + (": " + std::string(what)));
    ImageToPixels work;
    if (!work.prepare(picture, placement, filter_, {kernels().resize_rows, kernels().resize_columns}))
      throw std::bad_alloc();
    const Sink sink{values, gain_, bias_, bytes, table_};
    // a part reads the rows of its neighbours that its windows reach, so it should have many times more rows of its own
    const size_t min_rows = std::max<size_t>(256, 8 * work.window());
    const size_t grain = std::max<size_t>(1, placement.resized_height * min_rows / picture.height);
    std::atomic<bool> done{true};
    spread(context, rows_, grain, [&](size_t first, size_t last) {
      if (!work.run(first, last, sink)) done = false;
    });
    if (!done) throw std::bad_alloc();
    return nullptr;
  }

  // Null if the input is a picture, else the error.
  OrtStatusPtr check(Ort::KernelContext& context) const {
    const auto shape = context.GetInput(0).GetTensorTypeAndShapeInfo().GetShape();
    if (shape.size() != 3 || shape[2] != 3)
      return refuse(name_ + (": the picture has the shape " + text(shape) + "; expected [height, width, 3]"));
    if (std::min(shape[0], shape[1]) < 1 || std::max(shape[0], shape[1]) > static_cast<int64_t>(kMaxSide))
      return refuse(name_ + (": the picture has the shape " + text(shape) + "; expected sides within 1 to ") +
                    std::to_string(kMaxSide));
    return nullptr;
  }

 private:
  static size_t size(int64_t side) { return static_cast<size_t>(side); }

  [[noreturn]] void refuse_(const std::string& what) const {
    throw Ort::Exception(name_ + (": " + what), ORT_INVALID_ARGUMENT);
  }

  template <class T>
  T scalar(Ort::ConstKernelInfo info, const char* attribute) const {
    try {
      return info.GetAttribute<T>(attribute);
    } catch (const Ort::Exception& error) {
      refuse_("the attribute " + std::string(attribute) + " cannot be read: " + error.what());
    }
  }

  template <class T>
  std::vector<T> list(Ort::ConstKernelInfo info, const char* attribute) const {
    try {
      return info.GetAttributes<T>(attribute);
    } catch (const Ort::Exception& error) {
      refuse_("the attribute " + std::string(attribute) + " cannot be read: " + error.what());
    }
  }

  size_t choice(const char* attribute, const std::string& value, const std::vector<std::string>& known) const {
    const auto place = std::find(known.begin(), known.end(), value);
    if (place != known.end()) return static_cast<size_t>(place - known.begin());
    std::string all;
    for (const auto& name : known) all += (all.empty() ? "" : ", ") + name;
    refuse_(std::string(attribute) + " is '" + value.substr(0, 40) + "'; expected one of " + all);
  }

  size_t margin(size_t spare) const {
    const size_t half = spare / 2;
    return crop_floor_ || spare % 2 == 0 ? half : half + half % 2;  // to even, as Python rounds
  }

  Placement place(size_t height, size_t width) const {
    Placement p{rows_, columns_, 0, 0, rows_, columns_, pad_};
    if (resize_ == 1 || (keep_square_ && width == height)) return p;
    const auto w = static_cast<double>(width), h = static_cast<double>(height);
    if (resize_ == 2) {
      const double ratio = std::min(static_cast<double>(columns_) / w, static_cast<double>(rows_) / h);
      p.resized_width = std::max<size_t>(1, static_cast<size_t>(std::nearbyint(w * ratio)));
      p.resized_height = std::max<size_t>(1, static_cast<size_t>(std::nearbyint(h * ratio)));
      return p;
    }
    const auto product = static_cast<double>(shortest_ * std::max(width, height));
    const auto longer = static_cast<size_t>(product / std::min(w, h));
    p.resized_width = width <= height ? shortest_ : longer;
    p.resized_height = width <= height ? longer : shortest_;
    p.left = margin(p.resized_width - columns_);
    p.top = margin(p.resized_height - rows_);
    return p;
  }

  const char* name_;
  size_t rows_, columns_, shortest_, resize_;
  bool keep_square_, crop_floor_;
  Filter filter_;
  uint8_t pad_;
  float gain_[3], bias_[3];
  uint8_t table_[3][256];
};

template <bool quantized>
struct Kernel {
  explicit Kernel(Ort::ConstKernelInfo info) : settings(info, quantized) {}

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&]() -> OrtStatusPtr {
      Ort::KernelContext context(raw);
      if (OrtStatusPtr status = settings.check(context)) return status;
      auto output = context.GetOutput(0, settings.shape());
      if constexpr (quantized)
        return settings.compute(context, nullptr, output.template GetTensorMutableData<uint8_t>());
      else
        return settings.compute(context, output.template GetTensorMutableData<float>(), nullptr);
    });
  }

  Settings settings;
};

template <bool quantized>
struct Schema : Op<Schema<quantized>, Kernel<quantized>> {
  static constexpr const char* kOpName = kName[quantized];
  static constexpr Type kInputTypes[] = {kUint8}, kOutputTypes[] = {quantized ? kUint8 : kFloat};

  // [1, 3, *size]. The constructor of the kernel reports a wrong `size`.
  static OrtStatusPtr infer(OrtShapeInferContext* context) {
    const OrtApi& api = Ort::GetApi();
    const OrtOpAttr* attribute = nullptr;
    Ort::Status(api.ShapeInferContext_GetAttribute(context, "size", &attribute));  // released with its message
    int64_t size[2];
    size_t bytes = 0;
    if (!attribute || !Ort::Status(api.ReadOpAttr(attribute, ORT_OP_ATTR_INTS, size, sizeof size, &bytes)).IsOK() ||
        bytes != sizeof size || size[0] < 1 || size[1] < 1)
      return nullptr;
    OrtTensorTypeAndShapeInfo* info = nullptr;
    Ort::ThrowOnError(api.CreateTensorTypeAndShapeInfo(&info));
    const int64_t dims[4] = {1, 3, size[0], size[1]};
    OrtStatusPtr status = api.SetTensorElementType(info, kOutputTypes[0]);
    if (!status) status = api.SetDimensions(info, dims, 4);
    if (!status) status = api.ShapeInferContext_SetOutputTypeShape(context, 0, info);
    api.ReleaseTensorTypeAndShapeInfo(info);
    return status;
  }
};

}  // namespace

DEFINE_OP(image_to_pixels, Schema<false>)
DEFINE_OP(image_to_quantized_pixels, Schema<true>)

}  // namespace calmclip
