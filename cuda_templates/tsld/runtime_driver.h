// The CUDA driver, opened without CUDA headers: docs.nvidia.com/cuda/cuda-driver-api
#pragma once

#include <dlfcn.h>
#include <tvm/ffi/tvm_ffi.h>

#include <cstdint>

namespace tsld_runtime {

struct LaunchAttribute {
  int id, pad, value[16];
};

struct LaunchConfig {
  unsigned grid[3], block[3], shared;
  void* stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};

struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

struct Driver {
  int (*init)(unsigned);
  int (*error_string)(int, const char**);
  int (*device_attribute)(int*, int, int);
  int (*context_current)(void**);
  int (*context_set)(void*);
  int (*context_retain)(void**, int);
  int (*library_load)(void**, const void*, int*, void**, unsigned, int*, void**, unsigned);
  int (*library_kernel)(void**, void*, const char*);
  int (*kernel_set)(int, int, void*, int);
  int (*launch)(const LaunchConfig*, void*, void**, void**);
  int (*tensor_map)(TensorMap*, int, uint32_t, void*, const uint64_t*, const uint64_t*, const uint32_t*,
                    const uint32_t*, int, int, int, int);

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW);
    if (library == nullptr) TVM_FFI_THROW(RuntimeError) << "there is no NVIDIA driver here (libcuda.so.1).";
    load(library, init, "cuInit"), load(library, error_string, "cuGetErrorString");
    load(library, device_attribute, "cuDeviceGetAttribute"), load(library, context_current, "cuCtxGetCurrent");
    load(library, context_set, "cuCtxSetCurrent"), load(library, context_retain, "cuDevicePrimaryCtxRetain");
    load(library, library_load, "cuLibraryLoadData"), load(library, library_kernel, "cuLibraryGetKernel");
    load(library, kernel_set, "cuKernelSetAttribute"), load(library, launch, "cuLaunchKernelEx");
    load(library, tensor_map, "cuTensorMapEncodeTiled");
    check(init(0), "opening the driver");
  }

  void check(int status, const char* what) const {
    if (status == 0) return;
    const char* text = nullptr;
    error_string(status, &text);
    TVM_FFI_THROW(RuntimeError) << what << " failed: " << (text ? text : "unknown error") << " (CUDA driver error "
                                << status << ").";
  }

 private:
  template <class F>
  static void load(void* library, F& function, const char* name) {
    function = reinterpret_cast<F>(dlsym(library, name));
    if (function == nullptr)
      TVM_FFI_THROW(RuntimeError) << "the NVIDIA driver is too old: it lacks " << name << "; install one of CUDA 12.";
  }
};

inline const Driver& driver() {
  static const Driver found;
  return found;
}

// Makes a device's primary context current while it lives.
class Context {
 public:
  explicit Context(void* context) {
    driver().check(driver().context_current(&before_), "reading the context");
    if (before_ != context) driver().check(driver().context_set(context), "opening the device");
    changed_ = before_ != context && before_ != nullptr;
  }
  ~Context() {
    if (changed_) driver().context_set(before_);
  }

 private:
  void* before_ = nullptr;
  bool changed_ = false;
};

}  // namespace tsld_runtime
