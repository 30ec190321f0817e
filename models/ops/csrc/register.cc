// The entry point that ONNX Runtime calls when the library is registered with a session.
#include <map>
#include <memory>
#include <mutex>

#include "ops/op.h"

namespace calmclip {
namespace {

std::mutex guard;

std::string& left() {  // names between commas
  static std::string names = ",";
  return names;
}

// The domain with all operators but those left. A session keeps a pointer to its domain, so each lives as long as the
// library.
OrtCustomOpDomain* domain() {
  static std::map<std::string, std::unique_ptr<Ort::CustomOpDomain>> domains;
  std::unique_ptr<Ort::CustomOpDomain>& mine = domains[left()];
  if (!mine) {
    auto filled = std::make_unique<Ort::CustomOpDomain>(kDomain);
    const auto add = [&](const OrtCustomOp* op) {
      if (left().find("," + std::string(op->GetName(op)) + ",") == std::string::npos) filled->Add(op);
    };
#define OP(key) add(key##_op());
#include "ops/ops.inc"
#undef OP
    mine = std::move(filled);
  }
  return *mine;
}

}  // namespace
}  // namespace calmclip

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (!api) return base->GetApi(1)->CreateStatus(ORT_FAIL, "this ONNX Runtime is older than calmclip's op library");
  static const bool known = (Ort::InitApi(api), true);  // written once: sessions on other threads read it as they run
  (void)known;
  return calmclip::guarded([&]() -> OrtStatusPtr {
    const std::lock_guard<std::mutex> lock(calmclip::guard);
    Ort::ThrowOnError(api->AddCustomOpDomain(options, calmclip::domain()));
    return nullptr;
  });
}

// Sessions that register the library from now on do not get the operators with these names, which stand between commas,
// and run their functions instead; "" gives all again. Open sessions keep theirs.
extern "C" __attribute__((visibility("default"))) void calmclip_leave(const char* ops) {
  const std::lock_guard<std::mutex> lock(calmclip::guard);
  calmclip::left() = "," + std::string(ops) + ",";
}

// The version of the operators' contract, `calmclip.models.ops.spec.VERSION`.
extern "C" __attribute__((visibility("default"))) int calmclip_ops_version() { return 1; }
