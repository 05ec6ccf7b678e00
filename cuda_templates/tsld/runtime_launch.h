// Host side of a runtime module: from tensors to a kernel launch through the CUDA driver, without CUDA headers.
// The generated source (runtime_module.cc.j2) defines GemmParams, then includes this file, then gives the tables.
// The driver is opened on the first launch, so that a module loads on a machine without a GPU.
#pragma once

#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

#include "runtime_driver.h"

namespace tsld_runtime {

using tvm::ffi::Optional;
using tvm::ffi::TensorView;

enum Kind { kStream, kDigits, kMma, kTile, kWgmma };
constexpr int kTileRows = 16, kChunk = 128;

// One kernel: its tile shapes, and its compiled image for each target that has it (null: the target does not use it).
struct Kernel {
  const char* name;
  Kind kind;
  int threads, block_rows, block_tokens, tokens, warps_k, digits;
  int cluster, unit;                   // of the blocks that share K; chunks that a team takes at once
  int64_t shared_bytes;                // that do not depend on the shape
  const unsigned char* const* images;  // by target

  bool walks() const { return kind == kStream || kind == kDigits; }  // a block takes several row groups
};

struct Target {
  const char* name;
  int capability;   // 80 for sm_80 and compute_80
  bool exact;       // only this capability (sm_90a)
  bool ptx;         // compiled by the driver for anything newer
  int max_shared;   // dynamic shared memory that stream kernels are allowed, bytes
};

// Calls with up to m_max tokens run this plan. A row with m_max = 0 ends the table.
struct Range {
  int m_max;
  int kernel, splits, per_sm;
};

struct Linear {
  const char* name;
  int n, k, bits;
  bool bf16;
  const Range* const* ranges;  // by target
};

struct Launch {
  const Kernel* kernel;
  int splits;
  int64_t grid[3], shared_bytes, partial_floats, counters;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The plan of m tokens, as codegen/select_config.py computes it.
inline Launch plan(const Linear& linear, const Kernel* kernels, int target, int64_t m, int multiprocessors) {
  const Range* range = linear.ranges[target];
  while (range->m_max > 0 && m > range->m_max) ++range;
  if (range->m_max == 0)
    TVM_FFI_THROW(ValueError) << linear.name << ": " << m << " tokens in one call; the module was built for at most "
                              << range[-1].m_max << ". Pass fewer, or build it with a larger max_tokens.";
  const Kernel& kernel = kernels[range->kernel];
  const int64_t row_tiles = ceil_div(linear.n, kTileRows), chunks = ceil_div(linear.k, kChunk);
  const int64_t rows = ceil_div(row_tiles * kTileRows, kernel.block_rows), tokens = ceil_div(m, kernel.block_tokens);
  Launch out{&kernel, range->splits, {rows, tokens, range->splits}, kernel.shared_bytes, 0, rows * tokens};
  if (kernel.kind == kWgmma) {
    const int64_t blocks = std::min<int64_t>(rows * tokens * range->splits, multiprocessors * range->per_sm);
    out.grid[0] = blocks, out.grid[1] = 1, out.grid[2] = 1;
    out.partial_floats = range->splits * rows * tokens * kernel.block_rows * kernel.tokens;
    if (kernel.cluster) out.grid[0] = rows * tokens, out.grid[2] = range->splits;
  } else {
    out.partial_floats = range->splits * m * row_tiles * kTileRows;
  }
  if (kernel.walks()) {
    int64_t room = multiprocessors * range->per_sm / tokens;
    if (kernel.cluster && range->splits > 2) room = room * 10 / 11;  // larger clusters leave multiprocessors idle
    out.grid[0] = std::max<int64_t>(1, std::min(rows, room / range->splits));
    const int64_t groups = ceil_div(rows, out.grid[0]), slice = ceil_div(chunks, range->splits);
    const int64_t piece = kernel.tokens * (kernel.block_rows + 4) * 4;
    if (kernel.kind == kDigits) {
      const int64_t in_units = ceil_div(slice, kernel.unit) * kernel.unit;
      out.shared_bytes += in_units * (kernel.tokens * kChunk * 2 + (kernel.cluster ? 128 : 32)) + kernel.tokens * 16;
      out.shared_bytes += groups * piece;
    } else {
      if (kernel.digits)
        out.shared_bytes += slice * (kernel.tokens * kChunk * 4 + 64 + kChunk * 2) + kernel.tokens * 16 +
                            kernel.warps_k * 16 + groups * kernel.block_rows * kernel.tokens * 16;
      else
        out.shared_bytes += kernel.tokens * (slice * kChunk * 2 + 16) + (groups + kernel.warps_k) * piece;
    }
    out.shared_bytes += groups * kernel.block_rows * (linear.bits > 2 ? 5 : 4);
    out.counters = out.grid[0] * out.grid[1];
  }
  if (kernel.cluster) out.partial_floats = out.counters = 0;
  return out;
}

inline int choose_target(const Target* targets, int count, int capability) {
  for (int i = 0; i < count; ++i) {
    const Target& t = targets[i];
    if (t.exact ? capability == t.capability
                : capability >= t.capability && (t.ptx || capability / 10 == t.capability / 10))
      return i;
  }
  return -1;
}

struct Device {
  void* context;
  int target, multiprocessors;
  std::map<const Kernel*, void*> kernels;
};

class Module {
 public:
  Module(const Kernel* kernels, const Target* targets, int target_count)
      : kernels_(kernels), targets_(targets), target_count_(target_count) {}

  const Kernel* kernels() const { return kernels_; }
  int target_of(int capability) const { return choose_target(targets_, target_count_, capability); }

  void run(const Linear& linear, TensorView x, TensorView codes, Optional<TensorView> meta, TensorView row_scale,
           Optional<TensorView> row_zero, Optional<TensorView> bias, TensorView y, Optional<TensorView> partial,
           Optional<TensorView> counters) {
    const DLDevice where = x.device();
    const int64_t m = check(linear, x, y);
    for (const TensorView* tensor : {&codes, &row_scale, &y}) same_device(linear, where, *tensor);
    for (const auto* tensor : {&meta, &row_zero, &bias, &partial, &counters})
      if (tensor->has_value()) same_device(linear, where, tensor->value());
    if (m == 0) return;

    std::lock_guard<std::mutex> guard(mutex_);
    Device& device = device_of(where.device_id);
    const Target& target = targets_[device.target];
    Context context(device.context);
    const Launch launch = plan(linear, kernels_, device.target, m, device.multiprocessors);
    if (launch.partial_floats > 0 && launch.splits > 1 && (!partial.has_value() || !counters.has_value() ||
                              partial.value().numel() < launch.partial_floats ||
                              counters.value().numel() < launch.counters))
      TVM_FFI_THROW(ValueError) << linear.name << ": " << m << " tokens need a workspace of " << launch.partial_floats
                                << " floats and " << launch.counters << " counters.";
    GemmParams params{};
    params.x = x.data_ptr(), params.weights = codes.data_ptr(), params.row_scale = row_scale.data_ptr();
    params.meta = data(meta), params.row_zero = data(row_zero), params.bias = data(bias), params.y = y.data_ptr();
    if (launch.splits > 1) params.partial = data(partial), params.counters = data(counters);
    params.ldx = m > 1 ? x.stride(0) : ceil_div(linear.k, 8) * 8;
    params.m = static_cast<int>(m), params.n = linear.n, params.k = linear.k;
    params.row_tiles = static_cast<int>(ceil_div(linear.n, kTileRows));
    params.chunks = static_cast<int>(ceil_div(linear.k, kChunk));
    params.chunks_per_split = static_cast<int>(ceil_div(params.chunks, launch.splits));

    void* arguments[2] = {&params, nullptr};
    TensorMap map;
    if (launch.kernel->kind == kWgmma) {
      const uint64_t shape[2] = {static_cast<uint64_t>(linear.k), static_cast<uint64_t>(m)};
      const uint64_t stride[1] = {static_cast<uint64_t>(params.ldx) * 2};
      const uint32_t box[2] = {64, static_cast<uint32_t>(launch.kernel->tokens)}, step[2] = {1, 1};
      driver().check(driver().tensor_map(&map, linear.bf16 ? 9 : 6, 2, x.data_ptr(), shape, stride, box, step, 0, 3, 3, 0),
                     "describing the input to the copy engine");
      arguments[1] = &map;
    }
    LaunchAttribute attributes[2] = {
        {6, 0, {1}},                   // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        {4, 0, {1, 1, launch.splits}}  // CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    };
    LaunchConfig config{};
    for (int i = 0; i < 3; ++i) config.grid[i] = static_cast<unsigned>(launch.grid[i]);
    config.block[0] = launch.kernel->threads, config.block[1] = config.block[2] = 1;
    config.shared = static_cast<unsigned>(launch.shared_bytes);
    config.stream = TVMFFIEnvGetStream(where.device_type, where.device_id);
    if (target.capability >= 90) {
      config.attributes = attributes;
      config.attribute_count = launch.kernel->cluster && launch.splits > 1 ? 2 : 1;
    }
    void* kernel = kernel_of(device, where.device_id, *launch.kernel);
    driver().check(driver().launch(&config, kernel, arguments, nullptr), linear.name);
  }

 private:
  static void* data(const Optional<TensorView>& tensor) {
    return tensor.has_value() ? tensor.value().data_ptr() : nullptr;
  }

  static void same_device(const Linear& linear, DLDevice where, const TensorView& tensor) {
    if (tensor.device().device_type != where.device_type || tensor.device().device_id != where.device_id)
      TVM_FFI_THROW(ValueError) << linear.name << ": all tensors must lie on the CUDA device of x.";
  }

  // -> number of tokens
  static int64_t check(const Linear& linear, const TensorView& x, const TensorView& y) {
    if (x.device().device_type != kDLCUDA)
      TVM_FFI_THROW(ValueError) << linear.name << ": x is not on a CUDA device. Move it there.";
    const DLDataType dtype = x.dtype();
    if (dtype.code != (linear.bf16 ? kDLBfloat : kDLFloat) || dtype.bits != 16 || dtype.lanes != 1)
      TVM_FFI_THROW(TypeError) << linear.name << ": x must be " << (linear.bf16 ? "bfloat16." : "float16.");
    if (x.ndim() != 2 || x.size(1) != linear.k || y.ndim() != 2 || y.size(0) != x.size(0) || y.size(1) != linear.n)
      TVM_FFI_THROW(ValueError) << linear.name << ": built for x [m, " << linear.k << "] and y [m, " << linear.n
                                << "]; these tensors have other shapes.";
    if (x.size(0) > 1 && (x.stride(0) % 8 != 0 || (linear.k > 1 && x.stride(1) != 1)))
      TVM_FFI_THROW(ValueError) << linear.name << ": rows of x must be contiguous and 16-byte aligned.";
    if (reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 != 0)
      TVM_FFI_THROW(ValueError) << linear.name << ": x must start at a multiple of 16 bytes.";
    if (x.size(0) > INT32_MAX) TVM_FFI_THROW(ValueError) << linear.name << ": too many tokens in one call.";
    return x.size(0);
  }

  Device& device_of(int index) {
    auto found = devices_.find(index);
    if (found != devices_.end()) return found->second;
    int major = 0, minor = 0;
    Device device{};
    driver().check(driver().device_attribute(&major, 75, index), "reading the compute capability");
    driver().check(driver().device_attribute(&minor, 76, index), "reading the compute capability");
    driver().check(driver().device_attribute(&device.multiprocessors, 16, index), "counting multiprocessors");
    device.target = target_of(10 * major + minor);
    if (device.target < 0)
      TVM_FFI_THROW(RuntimeError) << "this module has no kernels for compute capability " << major << "." << minor
                                  << ". Build it again with this architecture.";
    driver().check(driver().context_retain(&device.context, index), "opening the device");
    return devices_.emplace(index, std::move(device)).first->second;
  }

  void* kernel_of(Device& device, int index, const Kernel& kernel) {
    void*& handle = device.kernels[&kernel];
    if (handle == nullptr) {
      void *library = nullptr, *found = nullptr;
      driver().check(
          driver().library_load(&library, kernel.images[device.target], nullptr, nullptr, 0, nullptr, nullptr, 0),
          "loading a kernel (a driver older than the one that it was built for?)");
      driver().check(driver().library_kernel(&found, library, kernel.name), kernel.name);
      int shared = static_cast<int>(kernel.shared_bytes), most = 0;
      driver().check(driver().device_attribute(&most, 97, index), "reading the shared memory of a block");
      if (kernel.walks()) shared = std::min(targets_[device.target].max_shared, most);
      driver().check(driver().kernel_set(8, shared, found, index), "setting a kernel's shared memory");
      handle = found;
    }
    return handle;
  }

  const Kernel* kernels_;
  const Target* targets_;
  const int target_count_;
  std::mutex mutex_;
  std::map<int, Device> devices_;
};

}  // namespace tsld_runtime
