// Attention in float32 with norms and rotations of queries and keys, and grouped queries.
// Source: Su et al. 2021 (arXiv 2104.09864), section 3.4; Ainslie et al. 2023 (arXiv 2305.13245), section 2.
#include "../kernels/rotary_attention.h"

#include <array>
#include <atomic>
#include <memory>
#include <new>

#include "../kernels/dispatch.h"
#include "quantized.h"

namespace calmclip {
namespace {

constexpr size_t kGrain = 1 << 18;  // products that are worth a thread: about 6 us

enum Place { kQ, kK, kV, kQWeight, kKWeight, kQCos, kQSin, kKCos, kKSin, kMask };

const Named kOp("RotaryAttention");

// A table of rotations, of `rows` rows for each text or for all; null data for one number, which means none.
struct Table {
  const float* data = nullptr;
  size_t batch = 0;

  Table(const Input<float>& input, size_t texts, size_t rows, size_t dims) {
    if (input.shape.size() <= 1 && input.count == 1) return;
    const size_t rank = input.shape.size();
    bool fits = rank >= 2 && rank <= 4 && input.side(rank - 2) == rows && input.side(rank - 1) == dims && dims % 2 == 0;
    for (size_t i = 0; fits && i + 2 < rank; ++i) fits = input.side(i) == 1 || (i == 0 && input.side(i) == texts);
    if (!fits)
      input.refuse("[" + std::to_string(rows) + ", " + std::to_string(dims) + "], an even number of columns, or [" +
                   std::to_string(texts) + " or 1, 1, " + std::to_string(rows) + ", " + std::to_string(dims) +
                   "], or one number");
    data = input.data;
    if (input.count != rows * dims) batch = rows * dims;
  }

  const float* of(size_t text) const { return data ? data + text * batch : nullptr; }
};

class Attention {
 public:
  explicit Attention(Ort::ConstKernelInfo info)
      : heads_(kOp.size(info, "heads", 1)),
        groups_(kOp.size(info, "groups", 1)),
        dims_(kOp.size(info, "dims", 1)),
        starts_{kOp.size(info, "q_start", 0), kOp.size(info, "k_start", 0), kOp.size(info, "v_start", 0)},
        epsilon_(kOp.attribute<float>(info, "epsilon")),
        cap_(kOp.attribute<float>(info, "cap")),
        gamma_(kOp.attribute<float>(info, "gamma")),
        zeta_(kOp.attribute<float>(info, "zeta")) {
    if (heads_ % groups_)
      kOp.invalid("heads is " + std::to_string(heads_) + " and groups " + std::to_string(groups_) +
                  "; expected a multiple of groups");
    if (!(cap_ >= 0) || !std::isfinite(cap_))
      kOp.invalid("cap is " + std::to_string(cap_) + "; expected a number of at least 0");
    if (!(gamma_ <= 0 && zeta_ >= 1 && gamma_ >= -1e30f && zeta_ <= 1e30f))
      kOp.invalid("gamma is " + std::to_string(gamma_) + " and zeta " + std::to_string(zeta_) +
                  "; expected -1e30 <= gamma <= 0 and 1 <= zeta <= 1e30");
    if (!(epsilon_ >= 0) || !std::isfinite(epsilon_))
      kOp.invalid("epsilon is " + std::to_string(epsilon_) + "; expected a number of at least 0");
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&]() -> OrtStatusPtr {
      Ort::KernelContext context(raw);
      const Input<float> q(kOp, context, kQ, "q"), k(kOp, context, kK, "k"), v(kOp, context, kV, "v");
      const Input<float> q_weight(kOp, context, kQWeight, "q_weight"), k_weight(kOp, context, kKWeight, "k_weight");
      const Input<float> q_cos(kOp, context, kQCos, "q_cos"), q_sin(kOp, context, kQSin, "q_sin");
      const Input<float> k_cos(kOp, context, kKCos, "k_cos"), k_sin(kOp, context, kKSin, "k_sin");
      const Input<float> mask(kOp, context, kMask, "mask");
      check(q, k, v);
      const size_t batch = q.side(0), rows = q.side(1), keys = k.side(1), width = heads_ * dims_;
      const Table tables[] = {{q_cos, batch, rows, dims_}, {q_sin, batch, rows, dims_},
                              {k_cos, batch, keys, dims_}, {k_sin, batch, keys, dims_}};
      const Input<float>* const named[] = {&q_cos, &q_sin, &k_cos, &k_sin};
      for (size_t i = 1; i < 4; ++i)
        if (!tables[i].data != !tables[0].data) named[i]->refuse("a table or one number, as q_cos");

      AttentionGroup group{};
      group.q_step = q.side(2), group.k_step = k.side(2), group.v_step = v.side(2), group.y_step = width;
      group.rows = rows, group.keys = keys, group.dims = dims_, group.heads = heads_ / groups_;
      group.q_weight = weight(q_weight), group.k_weight = weight(k_weight);
      group.epsilon = epsilon_, group.cap = cap_, group.gamma = gamma_, group.zeta = zeta_;
      size_t mask_batch = 0;
      const std::vector<Shown> shown = shown_of(mask, batch, rows, keys, group, mask_batch);
      auto output = context.GetOutput(0, {q.shape[0], q.shape[1], static_cast<int64_t>(width)});
      if (batch == 0 || rows == 0) return nullptr;
      float* const y = output.GetTensorMutableData<float>();

      const size_t products = 2 * (rows + 16) * keys * dims_ * group.heads;
      std::atomic<bool> room = true;
      spread(context, batch * groups_, kGrain / products, [&](size_t first, size_t last) {
        const std::unique_ptr<float[]> memory(new (std::nothrow) float[rotary_scratch(keys, dims_) + 16]);
        if (!memory) {
          room = false;
          return;
        }
        float* const scratch = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) / sizeof(float);
        for (size_t unit = first; unit < last; ++unit) {
          const size_t h = unit % groups_, b = unit / groups_;
          AttentionGroup mine = group;
          mine.q = q.data + b * rows * q.side(2) + starts_[0] + h * group.heads * dims_;
          mine.k = k.data + b * keys * k.side(2) + starts_[1] + h * dims_;
          mine.v = v.data + b * keys * v.side(2) + starts_[2] + h * dims_;
          mine.y = y + b * rows * width + h * group.heads * dims_;
          mine.q_cos = tables[0].of(b), mine.q_sin = tables[1].of(b);
          mine.k_cos = tables[2].of(b), mine.k_sin = tables[3].of(b);
          if (group.mask) {
            mine.mask += b * mask_batch;
            mine.shown = shown.data() + b * mask_batch / keys;
          }
          kernels().rotary_attention(mine, scratch);
        }
      });
      if (!room) return Ort::GetApi().CreateStatus(ORT_FAIL, "RotaryAttention: out of memory");
      return nullptr;
    });
  }

 private:
  void check(const Input<float>& q, const Input<float>& k, const Input<float>& v) const {
    const Input<float>* inputs[] = {&q, &k, &v};
    for (size_t i = 0; i < 3; ++i) {
      const Input<float>& x = *inputs[i];
      const size_t columns = (i ? groups_ : heads_) * dims_;
      if (x.shape.size() != 3) x.refuse("[batch, tokens, columns]");
      if (x.side(2) < starts_[i] + columns)
        x.refuse(std::to_string(columns) + " columns from " + std::to_string(starts_[i]) + " on");
    }
    if (k.shape[0] != q.shape[0]) k.refuse("the batch of q, " + std::to_string(q.shape[0]));
    if (k.side(1) == 0) k.refuse("at least one token");
    if (v.shape[0] != k.shape[0] || v.shape[1] != k.shape[1])
      v.refuse("the batch and tokens of k, " + text({k.shape[0], k.shape[1]}));
  }

  // Null if the input is one number, which means: no norm.
  const float* weight(const Input<float>& input) const {
    if (input.shape.size() == 1 && input.side(0) == dims_ && dims_ > 1) return input.data;
    if (input.shape.size() > 1 || input.count != 1) input.refuse("[" + std::to_string(dims_) + "], or one number");
    return nullptr;
  }

  // The keys that each row of the mask shows; sets the mask of `group`, and its step from text to text.
  static std::vector<Shown> shown_of(const Input<float>& mask, size_t batch, size_t rows, size_t keys,
                                     AttentionGroup& group, size_t& mask_batch) {
    if (mask.shape.size() == 1 && mask.count == 1) {
      if (*mask.data != 0)
        kOp.invalid("mask is one number, " + std::to_string(*mask.data) + "; expected 0, which means no mask");
      return {};
    }
    const size_t rank = mask.shape.size();
    std::array<size_t, 4> sides{1, 1, 1, 1};
    for (size_t i = 0; i < std::min<size_t>(rank, 4); ++i) sides[3 - i] = mask.side(rank - 1 - i);
    if (rank < 2 || rank > 4 || sides[3] != keys || (sides[2] != 1 && sides[2] != rows) || sides[1] != 1 ||
        (sides[0] != 1 && sides[0] != batch))
      mask.refuse("[1], or [" + std::to_string(batch) + " or 1, 1, " + std::to_string(rows) + " or 1, " +
                  std::to_string(keys) + "]");
    group.mask = mask.data;
    group.mask_row = sides[2] > 1 ? keys : 0;
    group.shown_step = sides[2] > 1;
    mask_batch = sides[0] > 1 ? sides[2] * keys : 0;
    std::vector<Shown> shown(mask.count / keys);
    for (size_t row = 0; row < shown.size(); ++row) {
      const float* const m = mask.data + row * keys;
      size_t first = 0, last = keys;
      while (first < last && !(m[first] > kHides)) ++first;
      while (last > first && !(m[last - 1] > kHides)) --last;
      bool plain = first < last;
      for (size_t s = first; plain && s < last; ++s) plain = m[s] == 0;
      if (first == last) first = 0, last = keys;
      shown[row] = {static_cast<uint32_t>(first), static_cast<uint32_t>(last), plain};
    }
    return shown;
  }

  size_t heads_, groups_, dims_, starts_[3];
  float epsilon_, cap_, gamma_, zeta_;
};

struct Schema : Op<Schema, Attention> {
  static constexpr const char* kOpName = "RotaryAttention";
  static constexpr Type kInputTypes[] = {kFloat, kFloat, kFloat, kFloat, kFloat, kFloat, kFloat, kFloat, kFloat, kFloat};
  static constexpr Type kOutputTypes[] = {kFloat};

  // [B, T, W]
  static OrtStatusPtr infer(OrtShapeInferContext* context) {
    Known q = Known::input(context, kQ);
    const auto heads = known_attribute<1>(context, "heads", ORT_OP_ATTR_INT);
    const auto dims = known_attribute<1>(context, "dims", ORT_OP_ATTR_INT);
    if (q.dims.size() != 3 || heads.empty() || dims.empty()) return nullptr;
    q.set(2, heads[0] * dims[0]);
    return q.output(context, 0, kFloat);
  }
};

}  // namespace

DEFINE_OP(rotary_attention, Schema)

}  // namespace calmclip
