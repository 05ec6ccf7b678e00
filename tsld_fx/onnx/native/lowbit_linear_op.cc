// ai.tsld::LowBitLinear (version 1) for onnxruntime's CPU provider; docs/onnx.md specifies the operator.
//
//   y[..., n] = sum over k of x[..., k] * (code[n, k] - zero[n, g(k)]) * scale[n, g(k)] + bias[n]
//
// Only the table of functions that onnxruntime hands over is used: nothing of it is linked, and any onnxruntime from
// API version TSLD_ORT_API on loads the library. The arithmetic is that of codegen/cpu/kernels; weights are repacked to
// its layout when the session is made.
#define ORT_API_MANUAL_INIT
#include "onnxruntime_cxx_api.h"
#undef ORT_API_MANUAL_INIT

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "tsld_cpu_impl.h"

#define TSLD_ORT_API 17  // onnxruntime 1.17: the oldest with everything that is used here
static_assert(ORT_API_VERSION >= TSLD_ORT_API, "these onnxruntime headers are too old: 1.17 or later is needed");

namespace {

constexpr int64_t kRound = 256;  // tokens per round: the workspace then stays in the cache
std::atomic<int64_t> calls{0};

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<void, Free>;

Buffer allocate(int64_t bytes) {
  void* p = std::aligned_alloc(64, (static_cast<size_t>(bytes) + 63) / 64 * 64);
  if (p == nullptr) throw std::bad_alloc();
  return Buffer(p);
}

// Scratch memory of the calling thread; it grows and is kept.
void* scratch(int64_t bytes) {
  thread_local Buffer buffer;
  thread_local int64_t size = 0;
  if (bytes > size) {
    buffer = allocate(bytes);
    size = bytes;
  }
  return buffer.get();
}

[[noreturn]] void refuse(const std::string& what) {
  throw Ort::Exception("ai.tsld::LowBitLinear: " + what, ORT_INVALID_ARGUMENT);
}

int64_t count(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (int64_t size : shape) n *= size;
  return n;
}

struct Weights {
  int64_t n = 0;
  Buffer blob;
};

class LowBitLinear {
 public:
  explicit LowBitLinear(const OrtKernelInfo* info) {
    Ort::ConstKernelInfo node(info);
    bits_ = node.GetAttribute<int64_t>("bits");
    inputs_ = node.GetAttribute<int64_t>("in_features");
    const auto activations = node.GetAttribute<std::string>("activations");
    if (bits_ != 2 && bits_ != 4 && bits_ != 8) refuse("bits is " + std::to_string(bits_) + ", expected 2, 4 or 8");
    if (inputs_ < 1) refuse("in_features is " + std::to_string(inputs_));
    if (activations == "a16") {
      mode_ = TSLD_CPU_A16;
    } else if (activations == "int8") {
      mode_ = TSLD_CPU_INT8;
    } else {
      refuse("activations is '" + activations + "', expected 'a16' or 'int8'");
    }
    level_ = tsld_cpu_level();
    int packed = 0, scales = 0, zeros = 0;
    auto p = node.GetTensorConstantInput(1, &packed);
    auto s = node.GetTensorConstantInput(2, &scales);
    if (!packed || !scales) return;  // made by other nodes: repacked at every call
    if (node.GetInputCount() > 3) {
      auto z = node.GetTensorConstantInput(3, &zeros);
      if (zeros) {
        weights_ = repack(p, s, z);
        return;
      }
      if (!node.GetInputName(3).empty()) return;
    }
    weights_ = repack(p, s, Ort::ConstValue());
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* context) {
    try {
      compute(context);
      return nullptr;
    } catch (const Ort::Exception& error) {
      return Ort::Status(error).release();
    } catch (const std::exception& error) {
      return Ort::Status(error.what(), ORT_RUNTIME_EXCEPTION).release();
    }
  }

 private:
  template <typename Value>
  Weights repack(const Value& packed, const Value& scales, const Ort::ConstValue& zeros) const {
    const auto shape = packed.GetTensorTypeAndShapeInfo().GetShape();
    const auto grid = scales.GetTensorTypeAndShapeInfo().GetShape();
    if (shape.size() < 2 || shape.size() > 3) refuse("packed has rank " + std::to_string(shape.size()));
    const int64_t n = shape[0], row = shape.size() == 2 ? shape[1] : shape[1] * shape[2];
    const int64_t bytes = (inputs_ * bits_ + 7) / 8;
    if (row < bytes) refuse("packed rows have " + std::to_string(row) + " bytes, in_features need " + std::to_string(bytes));
    const bool one = grid.size() == 2 && grid[0] == 1 && n != 1;
    if (grid.size() != 2 || (!one && grid[0] != n) || grid[1] < 1 || inputs_ % grid[1] != 0 || (one && grid[1] != 1))
      refuse("scales must be [rows, groups] with groups that divide in_features, or [1, 1]");
    const bool has_zeros = static_cast<const OrtValue*>(zeros) != nullptr;
    if (has_zeros && zeros.GetTensorTypeAndShapeInfo().GetShape() != grid) refuse("zeros must have the shape of scales");
    const uint8_t* codes = packed.template GetTensorData<uint8_t>();
    std::vector<uint8_t> tight;
    if (row != bytes) {  // rows padded to whole blocks
      tight.resize(static_cast<size_t>(n * bytes));
      for (int64_t i = 0; i < n; ++i) std::memcpy(tight.data() + i * bytes, codes + i * row, static_cast<size_t>(bytes));
      codes = tight.data();
    }
    const int64_t group = inputs_ / grid[1];
    const int bits = static_cast<int>(bits_);
    Weights made;
    made.n = n;
    made.blob = allocate(tsld_cpu_packed_bytes(bits, n, inputs_, group, has_zeros));
    tsld_cpu_pack(bits, n, inputs_, group, codes, scales.template GetTensorData<float>(), one ? 0 : 1,
                  has_zeros ? zeros.GetTensorData<uint8_t>() : nullptr, made.blob.get());
    return made;
  }

  void compute(OrtKernelContext* raw) {
    Ort::KernelContext context(raw);
    const size_t given = context.GetInputCount();
    const auto x = context.GetInput(0);
    auto shape = x.GetTensorTypeAndShapeInfo().GetShape();
    if (shape.empty() || shape.back() != inputs_)
      refuse("x has " + std::to_string(shape.empty() ? 0 : shape.back()) + " features, the weight " + std::to_string(inputs_));
    Weights fresh;
    if (!weights_.blob) {
      const auto zeros = given > 3 ? context.GetInput(3) : Ort::ConstValue();
      fresh = repack(context.GetInput(1), context.GetInput(2), zeros);
    }
    const Weights& weights = weights_.blob ? weights_ : fresh;
    const float* bias = nullptr;
    if (given > 4) {
      const auto value = context.GetInput(4);
      if (static_cast<const OrtValue*>(value) != nullptr) {
        if (count(value.GetTensorTypeAndShapeInfo().GetShape()) != weights.n) refuse("bias must be [rows]");
        bias = value.GetTensorData<float>();
      }
    }
    const int64_t tokens = count(shape) / inputs_;
    shape.back() = weights.n;
    float* y = context.GetOutput(0, shape).GetTensorMutableData<float>();
    ++calls;
    const float* data = x.GetTensorData<float>();
    for (int64_t start = 0; start < tokens; start += kRound) {
      const int64_t size = std::min(kRound, tokens - start);
      round(raw, weights, data + start * inputs_, size, bias, y + start * weights.n);
    }
  }

  // One round of tokens: first every row of x is quantised, then every panel of the weight multiplied.
  void round(OrtKernelContext* context, const Weights& weights, const float* x, int64_t tokens, const float* bias,
             float* y) const {
    const void* blob = weights.blob.get();
    void* workspace = scratch(tsld_cpu_workspace_bytes(blob, level_, mode_, tokens));
    const int64_t panels = tsld_cpu_panels(blob);
    // Work items: a run of panels, long enough to stream memory, short enough to share among 16 threads.
    const int64_t run = std::max<int64_t>(1, panels / 32), cuts = (panels + run - 1) / run;
    const int64_t steps = (tokens + TSLD_CPU_TOKEN_STEP - 1) / TSLD_CPU_TOKEN_STEP;
    struct Job {
      const LowBitLinear* self;
      const void* blob;
      void* workspace;
      const float *x, *bias;
      float* y;
      int64_t tokens, panels, run, n;
    } job{this, blob, workspace, x, bias, y, tokens, panels, run, weights.n};
    const auto quantize = [](void* given, size_t step) {
      const Job& j = *static_cast<Job*>(given);
      const int64_t t0 = static_cast<int64_t>(step) * TSLD_CPU_TOKEN_STEP;
      tsld_cpu_quantize(j.blob, j.self->level_, j.self->mode_, j.x, TSLD_CPU_F32, j.self->inputs_, j.tokens, j.workspace,
                        t0, std::min(j.tokens, t0 + TSLD_CPU_TOKEN_STEP));
    };
    const auto multiply = [](void* given, size_t cut) {
      const Job& j = *static_cast<Job*>(given);
      const int64_t p0 = static_cast<int64_t>(cut) * j.run;
      tsld_cpu_multiply(j.blob, j.self->level_, j.self->mode_, j.tokens, j.workspace, j.bias, j.y, TSLD_CPU_F32, j.n, 0,
                        j.tokens, p0, std::min(j.panels, p0 + j.run));
    };
    run_parallel(context, quantize, steps, &job);
    run_parallel(context, multiply, cuts, &job);
  }

  // onnxruntime's own threads; one item needs none.
  static void run_parallel(OrtKernelContext* context, void (*work)(void*, size_t), int64_t items, void* job) {
    if (items == 1) {
      work(job, 0);
    } else {
      Ort::ThrowOnError(Ort::GetApi().KernelContext_ParallelFor(context, work, static_cast<size_t>(items), 0, job));
    }
  }

  int64_t bits_ = 0, inputs_ = 0;
  int mode_ = TSLD_CPU_A16, level_ = 0;
  Weights weights_;
};

// CustomOpBase, not onnxruntime_lite_custom_op.h: the latter crashes on an optional input given as "".
struct LowBitLinearOp : Ort::CustomOpBase<LowBitLinearOp, LowBitLinear, true> {
  LowBitLinearOp() { version = TSLD_ORT_API; }
  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    try {
      *kernel = new LowBitLinear(info);
      return nullptr;
    } catch (const Ort::Exception& error) {
      return Ort::Status(error).release();
    } catch (const std::exception& error) {
      return Ort::Status(error.what(), ORT_RUNTIME_EXCEPTION).release();
    }
  }
  const char* GetName() const { return "LowBitLinear"; }
  const char* GetExecutionProviderType() const { return "CPUExecutionProvider"; }
  size_t GetInputTypeCount() const { return 5; }
  ONNXTensorElementDataType GetInputType(size_t i) const {
    return i == 1 || i == 3 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t i) const {
    return i >= 3 ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
  static Ort::Status InferOutputShape(Ort::ShapeInferContext& context) {
    auto shape = context.GetInputShape(0);
    const auto packed = context.GetInputShape(1);
    if (shape.empty() || packed.empty()) return Ort::Status{nullptr};
    for (const auto& size : shape)  // unknown sizes come as -1, and would be set as such
      if (size.IsInt() && size.AsInt() < 0) return Ort::Status{nullptr};
    shape.back() = packed[0];
    context.SetOutputShape(0, shape, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
    return Ort::Status{nullptr};
  }
};

}  // namespace

// How many times the kernel has run in this process: shows that a session uses it.
extern "C" __attribute__((visibility("default"))) int64_t tsld_ort_calls() { return calls.load(); }

extern "C" __attribute__((visibility("default"))) OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                                                           const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(TSLD_ORT_API);
  if (api == nullptr) return nullptr;  // older than 1.17; it has said so on stderr and runs the functions
  Ort::InitApi(api);
  try {
    // Never destroyed: a destructor at exit would call into an onnxruntime that is gone already.
    static Ort::CustomOpDomain& domain = *[] {
      auto* made = new Ort::CustomOpDomain("ai.tsld");
      made->Add(new LowBitLinearOp);
      return made;
    }();
    Ort::UnownedSessionOptions(options).Add(domain);
    return nullptr;
  } catch (const Ort::Exception& error) {
    return Ort::Status(error).release();
  }
}
