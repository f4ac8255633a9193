// Modules. An image has to be PTX that this driver and device would take; a function is a name that the PTX declares
// and that this library was built with, with parameters of the same sizes.
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>

#include "call.h"

namespace gradclip {
namespace driver {

namespace {

// Newest PTX ISA of a driver, both as 10 * major + minor. Since CUDA 11 the minor versions mostly go together.
int newest_ptx_of(int driver_version) {
  const int major = driver_version / 1000;
  const int minor = driver_version % 1000 / 10;
  if (major == 11) return 70 + minor;
  if (major == 12) return minor <= 5 ? 80 + minor : minor == 6 ? 85 : 86 + minor - 7;
  return (major - 4) * 10 + minor;
}

const char* skip_space_and_comments(const char* p) {
  for (;;) {
    while (std::isspace(static_cast<unsigned char>(*p))) ++p;
    if (p[0] == '/' && p[1] == '/') {
      while (*p && *p != '\n') ++p;
    } else if (p[0] == '/' && p[1] == '*') {
      const char* end = std::strstr(p + 2, "*/");
      if (!end) return p + std::strlen(p);
      p = end + 2;
    } else {
      return p;
    }
  }
}

// The word after a directive, at any later place of the text: ".target sm_80" -> "sm_80".
std::string word_after(const char* text, const char* directive) {
  const char* found = std::strstr(text, directive);
  if (!found) return {};
  const char* begin = skip_space_and_comments(found + std::strlen(directive));
  const char* end = begin;
  while (*end && !std::isspace(static_cast<unsigned char>(*end)) && !std::strchr(",;(){}", *end)) ++end;
  return std::string(begin, end);
}

// Bytes of one declaration such as ".param .align 8 .b8 name[3856]"; 0 when it cannot be told.
uint32_t param_size(const std::string& declaration) {
  uint32_t element = 0;
  for (size_t dot = declaration.find('.'); dot != std::string::npos; dot = declaration.find('.', dot + 1)) {
    const char kind = declaration.c_str()[dot + 1];
    const int bits = std::atoi(declaration.c_str() + dot + 2);
    if (std::strchr("bufs", kind) && (bits == 8 || bits == 16 || bits == 32 || bits == 64)) {
      element = static_cast<uint32_t>(bits / 8);
    }
  }
  const size_t bracket = declaration.find('[');
  const int count = bracket == std::string::npos ? 1 : std::atoi(declaration.c_str() + bracket + 1);
  return element * static_cast<uint32_t>(count);
}

struct Entry {
  std::string name;
  std::vector<uint32_t> param_sizes;  // empty also for an abridged text, "entry name()"
};

std::vector<Entry> entries_of(const char* text) {
  std::vector<Entry> entries;
  for (const char* p = text; (p = std::strstr(p, ".entry")); p += 6) {
    Entry entry;
    entry.name = word_after(p, ".entry");
    const char* open = std::strchr(p, '(');
    const char* body = std::strchr(p, '{');
    const char* close = open && (!body || open < body) ? std::strchr(open, ')') : nullptr;
    std::string params = close ? std::string(open + 1, close) : std::string();
    for (size_t begin = 0; params.find(".param", begin) != std::string::npos;) {
      const size_t comma = params.find(',', begin);
      entry.param_sizes.push_back(param_size(params.substr(begin, comma - begin)));
      if (comma == std::string::npos) break;
      begin = comma + 1;
    }
    entries.push_back(std::move(entry));
  }
  return entries;
}

bool matches(const Entry& entry, const host::HostKernel& kernel) {
  if (entry.param_sizes.empty()) return true;
  bool same = entry.param_sizes.size() == kernel.num_params;
  for (uint32_t i = 0; same && i < kernel.num_params; ++i) same = entry.param_sizes[i] == kernel.params[i].size;
  if (!same) complain("the parameters of %s in the PTX are not those of the source", kernel.symbol);
  return same;
}

CUresult load(CUmodule* out, const char* text, Context* context) {
  if (const CUresult refused = refuse_during_capture()) return refused;
  ++counters().module_loads;
  if (!text) return CUDA_ERROR_INVALID_VALUE;
  const char* begin = skip_space_and_comments(text);
  if (std::strncmp(begin, ".version", 8) != 0) {
    complain("the image does not begin like PTX, the only kind of image there is here");
    return CUDA_ERROR_INVALID_IMAGE;
  }
  int major = 0, minor = 0;
  if (std::sscanf(word_after(begin, ".version").c_str(), "%d.%d", &major, &minor) != 2) return CUDA_ERROR_INVALID_PTX;
  if (major * 10 + minor > newest_ptx_of(driver().settings.driver_version)) return CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
  int target = 0;
  if (std::sscanf(word_after(begin, ".target").c_str(), "sm_%d", &target) != 1) return CUDA_ERROR_INVALID_PTX;
  if (target > driver().settings.capability_major * 10 + driver().settings.capability_minor) {
    complain("PTX for sm_%d on a device of compute capability %d.%d", target, driver().settings.capability_major,
             driver().settings.capability_minor);
    return CUDA_ERROR_INVALID_PTX;
  }
  auto module = std::make_shared<Module>();
  module->context = context;
  module->context_id = context->id;
  for (const Entry& entry : entries_of(begin)) {
    const host::HostKernel* kernel = host::find_kernel(entry.name.c_str());
    if (kernel && !matches(entry, *kernel)) return CUDA_ERROR_INVALID_IMAGE;
    module->entries.push_back(entry.name);
  }
  *out = add_handle<Module, CUmodule>(driver().modules, module);
  return CUDA_SUCCESS;
}

// What the attributes of a real kernel could look like.
int function_attribute(int attribute, const host::HostKernel& kernel) {
  switch (attribute) {
    case 0: return static_cast<int>(kernel.threads);  // MAX_THREADS_PER_BLOCK: its launch bounds
    case 1: return 1024;                              // SHARED_SIZE_BYTES
    case 4: return 40;                                // NUM_REGS
    case 5: case 6: return driver().settings.capability_major * 10 + driver().settings.capability_minor;
    default: return 0;
  }
}

int blocks_per_multiprocessor(int block_size) {
  const int by_threads = block_size > 0 ? 2048 / block_size : 0;
  return by_threads < 32 ? by_threads : 32;
}

}  // namespace

}  // namespace driver
}  // namespace gradclip

using namespace gradclip::driver;

DRIVER_API CUresult cuModuleLoadData(CUmodule* out, const void* image) {
  ContextCall call(__func__);
  return call.refused ? call.refused : load(out, static_cast<const char*>(image), call.context);
}

DRIVER_API CUresult cuModuleLoadDataEx(CUmodule* out, const void* image, unsigned, const int*, void**) {
  ContextCall call(__func__);
  return call.refused ? call.refused : load(out, static_cast<const char*>(image), call.context);
}

DRIVER_API CUresult cuModuleLoad(CUmodule* out, const char* path) {
  ContextCall call(__func__);
  if (call.refused) return call.refused;
  std::ifstream file(path, std::ios::binary);
  if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  return load(out, text.c_str(), call.context);
}

DRIVER_API CUresult cuModuleUnload(CUmodule handle) {
  ContextCall call(__func__);
  if (call.refused) return call.refused;
  const auto module = find_handle(driver().modules, handle);
  if (!module || is_stale(module->context_id, *module->context)) return CUDA_ERROR_INVALID_HANDLE;
  auto& functions = driver().functions;
  for (auto it = functions.begin(); it != functions.end();) {
    it = it->second->module == module.get() ? functions.erase(it) : std::next(it);
  }
  driver().modules.erase(handle);
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuModuleGetFunction(CUfunction* out, CUmodule handle, const char* name) {
  ContextCall call(__func__);
  if (call.refused) return call.refused;
  const auto module = find_handle(driver().modules, handle);
  if (!module || is_stale(module->context_id, *module->context)) return CUDA_ERROR_INVALID_HANDLE;
  bool declared = false;
  for (const std::string& entry : module->entries) declared |= entry == name;
  if (!declared) return CUDA_ERROR_NOT_FOUND;
  const gradclip::host::HostKernel* kernel = gradclip::host::find_kernel(name);
  if (!kernel) {
    complain("%s is in the PTX, but tests/double/kernels.cpp does not list it", name);
    return CUDA_ERROR_NOT_FOUND;
  }
  auto function = std::make_shared<Function>();
  function->context = module->context;
  function->context_id = module->context_id;
  function->module = module.get();
  function->kernel = kernel;
  *out = add_handle<Function, CUfunction>(driver().functions, function);
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuModuleGetGlobal_v2(CUdeviceptr*, size_t*, CUmodule, const char*) {
  ContextCall call(__func__);
  return call.refused ? call.refused : CUDA_ERROR_NOT_FOUND;
}

DRIVER_API CUresult cuFuncGetAttribute(int* value, int attribute, CUfunction handle) {
  Call call(__func__);
  if (call.refused) return call.refused;
  const auto function = find_handle(driver().functions, handle);
  if (!function) return CUDA_ERROR_INVALID_HANDLE;
  *value = function_attribute(attribute, *function->kernel);
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuFuncSetAttribute(CUfunction handle, int, int) {
  Call call(__func__);
  if (call.refused) return call.refused;
  return find_handle(driver().functions, handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

DRIVER_API CUresult cuFuncSetCacheConfig(CUfunction handle, int) {
  Call call(__func__);
  if (call.refused) return call.refused;
  return find_handle(driver().functions, handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

DRIVER_API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction, int block_size, size_t) {
  ContextCall call(__func__);
  if (call.refused) return call.refused;
  *blocks = blocks_per_multiprocessor(block_size);
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, CUfunction, int block_size,
                                                                         size_t, unsigned) {
  ContextCall call(__func__);
  if (call.refused) return call.refused;
  *blocks = blocks_per_multiprocessor(block_size);
  return CUDA_SUCCESS;
}
