// The sum of two tensors of bytes, in bytes. Source: Jacob et al. 2017 (arXiv 1712.05877), appendix A.2.
//
// What a graph holds as constants is made ready once, when its node's kernel is made; what is fed, in every run.
#include <functional>
#include <numeric>
#include <optional>

#include "../kernels/dispatch.h"
#include "quantized.h"

namespace calmclip {
namespace {

constexpr size_t kGrain = 131072;       // numbers that are worth a thread: some 8 us
constexpr size_t kNear = 65536;         // bytes of each at a time, block of columns by block of columns: a part of a cache
constexpr size_t kMostRepeated = 1024;  // columns; of more, what lies behind whole blocks is little
constexpr double kMostFactor = 1 << 20;

enum Place : size_t { kA, kAScale, kAZero, kB, kBScale, kBZero, kYScale, kYZero };

const Named kOp("QuantAdd");

// The inputs by their places: of a run, or the constants among them.
using Inputs = std::function<Ort::ConstValue(Place)>;

class Add {
 public:
  explicit Add(Ort::ConstKernelInfo info) {
    bool all = true;
    const Inputs inputs = [&](Place place) { return constant(info, place); };
    for (const Place place : kFixed) all &= static_cast<bool>(inputs(place));
    if (all) columns_.emplace(columns(inputs));
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&]() -> OrtStatusPtr {
      Ort::KernelContext context(raw);
      std::optional<Columns> fed;
      if (!columns_) fed.emplace(columns([&](Place place) { return context.GetInput(place); }));
      const Columns& of = columns_ ? *columns_ : *fed;
      const Input<uint8_t> a(kOp, context, kA, "a"), b(kOp, context, kB, "b");
      if (of.n != 1 && (a.shape.empty() || a.side(a.shape.size() - 1) != of.n))
        a.refuse("[..., " + std::to_string(of.n) + "], for scales or zero points are of " + std::to_string(of.n) +
                 " columns");
      if (b.shape != a.shape) b.refuse("that of a, " + text(a.shape));
      auto output = context.GetOutput(0, a.shape);
      if (a.count == 0) return nullptr;
      AddBlock whole{};
      whole.a = a.data;
      whole.b = b.data;
      whole.y = output.GetTensorMutableData<uint8_t>();
      whole.step = of.wide;
      whole.a_factor = of.a_factor.data();
      whole.b_factor = of.b_factor.data();
      whole.start = of.start.data();
      whole.zero = of.zero.data();
      const size_t rows = (a.count + of.wide - 1) / of.wide;
      spread(context, rows, kGrain / of.wide, [&](size_t first, size_t last) {
        run(whole, first * of.wide, std::min(last * of.wide, a.count));
      });
      return nullptr;
    });
  }

 private:
  static constexpr Place kFixed[] = {kAScale, kAZero, kBScale, kBZero, kYScale, kYZero};

  // n: how many columns have numbers of their own. The numbers of several rows lie one behind the other, so that blocks
  // are whole: a tensor is read in rows that are `wide`.
  struct Columns {
    size_t n, wide;
    std::vector<float> a_factor, b_factor, start;
    std::vector<int32_t> zero;
  };

  static Columns columns(const Inputs& inputs) {
    const Input<float> a_scale(kOp, inputs(kAScale), "a_scale"), b_scale(kOp, inputs(kBScale), "b_scale");
    const Input<float> y_scale(kOp, inputs(kYScale), "y_scale");
    const Input<uint8_t> a_zero(kOp, inputs(kAZero), "a_zero"), b_zero(kOp, inputs(kBZero), "b_zero");
    const Input<uint8_t> y_zero(kOp, inputs(kYZero), "y_zero");
    size_t n = 1;
    for (const auto* shape : {&a_scale.shape, &b_scale.shape, &y_scale.shape, &a_zero.shape, &b_zero.shape, &y_zero.shape})
      if (shape->size() == 1 && shape->front() != 1) n = static_cast<size_t>(shape->front());
    for (const auto* scale : {&a_scale, &b_scale, &y_scale}) scale->check_scales();
    const auto each = [n](const auto& input) {
      return [data = input.data, step = input.columns(n) ? size_t{1} : size_t{0}](size_t c) { return data[c * step]; };
    };
    const auto a_step = each(a_scale), b_step = each(b_scale), y_step = each(y_scale);
    const auto a_point = each(a_zero), b_point = each(b_zero), y_point = each(y_zero);
    const size_t wide = n > kMostRepeated ? n : std::lcm(n, kAddBlock);
    const size_t room = (wide + kAddBlock - 1) / kAddBlock * kAddBlock;
    Columns made{n, wide, std::vector<float>(room), std::vector<float>(room), std::vector<float>(room),
                 std::vector<int32_t>(room)};
    for (size_t column = 0; column < wide; ++column) {
      const size_t c = column % n, i = add_place(column);
      const double a = double{a_step(c)} / y_step(c), b = double{b_step(c)} / y_step(c);
      if (std::max(a, b) > kMostFactor)
        kOp.invalid("a scale is " + std::to_string(std::max(a, b)) + " times y_scale; expected at most 2^20 times");
      made.a_factor[i] = static_cast<float>(a);
      made.b_factor[i] = static_cast<float>(b);
      made.start[i] = static_cast<float>(-(a_point(c) * a + b_point(c) * b));
      made.zero[i] = y_point(c);
    }
    return made;
  }

  // From a row's beginning to another one's, or to the end. `all` says what a row is.
  static void run(const AddBlock& all, size_t from, size_t to) {
    const size_t wide = all.step, near = std::max<size_t>(kNear / wide, 1);
    while (from < to) {
      const size_t rows = std::clamp<size_t>((to - from) / wide, 1, near), end = std::min(wide, to - from);
      for (size_t column = 0; column < end; column += kAddBlock) {
        AddBlock block = all;
        block.a += from + column;
        block.b += from + column;
        block.y += from + column;
        block.rows = rows;
        block.width = std::min(kAddBlock, end - column);
        block.a_factor += column;
        block.b_factor += column;
        block.start += column;
        block.zero += column;
        kernels().quant_add(block);
      }
      from += rows * wide;
    }
  }

  std::optional<Columns> columns_;
};

struct Schema : Op<Schema, Add> {
  Schema() {
    // y has the shape of a, and may take its place or that of b.
    InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) {
      return guarded([&]() -> OrtStatusPtr {
        const Known a = Known::input(context, kA);
        return a.dims.empty() ? nullptr : a.output(context, 0, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8);
      });
    };
    GetMayInplace = [](int** inputs, int** outputs) -> size_t {
      static int given[] = {kA, kB}, made[] = {0, 0};
      *inputs = given;
      *outputs = made;
      return 2;
    };
    ReleaseMayInplace = [](int*, int*) {};
  }
  const char* GetName() const { return "QuantAdd"; }
  size_t GetInputTypeCount() const { return 8; }
  ONNXTensorElementDataType GetInputType(size_t input) const {
    return input == kAScale || input == kBScale || input == kYScale ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
                                                                    : ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
  }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8; }
};

}  // namespace

const OrtCustomOp* quant_add_op() {
  static const Schema op;
  return &op;
}

}  // namespace calmclip
