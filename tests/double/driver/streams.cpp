// Streams. Each has a queue of its own, and draining one runs nothing of another that it does not wait for: a missing
// dependency between streams shows as work that was not done yet.
#include "call.h"

namespace gradclip {
namespace driver {

namespace {

const CUstream kLegacyHandle = reinterpret_cast<CUstream>(1);
const CUstream kPerThreadHandle = reinterpret_cast<CUstream>(2);

std::shared_ptr<Stream> new_stream(Context* context, unsigned flags) {
  auto stream = std::make_shared<Stream>();
  stream->context = context;
  stream->flags = flags;
  driver().all_streams.push_back(stream);
  return stream;
}

// Of one context, or of all.
template <class Visit>
void for_each_stream(const Context* context, Visit visit) {
  std::vector<std::shared_ptr<Stream>> streams;  // a copy: work may create streams
  for (const Context& primary : driver().primary) streams.push_back(primary.legacy);
  for (const auto& other : driver().contexts) streams.push_back(other.second->legacy);
  for (const auto& weak : driver().all_streams) {
    if (const auto stream = weak.lock()) streams.push_back(stream);
  }
  for (const auto& stream : streams) {
    if (!context || stream->context == context) visit(stream);
  }
}

void push(const std::shared_ptr<Stream>& stream, QueuedWork work) {
  stream->queue.push_back(std::move(work));
  ++stream->issued;
}

// The legacy stream and the blocking streams of its context wait for each other.
void wait_for_legacy_rules(const std::shared_ptr<Stream>& stream) {
  if (stream->legacy) {
    for_each_stream(stream->context, [&](const std::shared_ptr<Stream>& other) {
      if (other != stream && other->blocking()) issue_wait(stream, other, other->issued);
    });
  } else if (stream->blocking()) {
    issue_wait(stream, stream->context->legacy, stream->context->legacy->issued);
  }
}

CUresult create_stream(CUstream* out, unsigned flags, Context* context) {
  if (flags > CU_STREAM_NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE;
  *out = add_handle<Stream, CUstream>(driver().streams, new_stream(context, flags));
  return CUDA_SUCCESS;
}

}  // namespace

void init_context(Context& context, int device, bool primary) {
  context = Context();
  context.device = device;
  context.primary = primary;
  context.legacy = std::make_shared<Stream>();
  context.legacy->context = &context;
  context.legacy->legacy = true;
}

CUresult find_stream(CUstream handle, std::shared_ptr<Stream>& out) {
  if (handle == nullptr || handle == kLegacyHandle || handle == kPerThreadHandle) {
    Context* context = current_context();
    if (!context) return CUDA_ERROR_INVALID_CONTEXT;
    if (handle == kPerThreadHandle) {
      auto& mine = context->per_thread[std::this_thread::get_id()];
      if (!mine) mine = new_stream(context, 0);
      out = mine;
    } else {
      out = context->legacy;
    }
  } else {
    out = find_handle(driver().streams, handle);
    if (!out) {
      complain("%p is no stream, or one that was destroyed", static_cast<void*>(handle));
      return CUDA_ERROR_INVALID_HANDLE;
    }
  }
  if (out->context->retained == 0) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
  return out->context->broken;
}

CUresult refuse_legacy_during_capture(const Stream& stream, bool invalidate) {
  if (!stream.legacy) return CUDA_SUCCESS;
  CUresult refused = CUDA_SUCCESS;
  for_each_stream(stream.context, [&](const std::shared_ptr<Stream>& other) {
    if (!other->capture || !other->blocking()) return;
    if (invalidate) other->capture->invalidated = true;
    refused = CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
  });
  return refused;
}

CUresult issue(const std::shared_ptr<Stream>& stream, NodeType type, Work work) {
  if (stream->capture) {
    if (stream->capture->invalidated) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    stream->capture->nodes.push_back(std::make_shared<GraphNode>(GraphNode{type, std::move(work)}));
    ++stream->captured_nodes;
    if (stream->capture->streams.front().lock() != stream) stream->joined = false;
    return CUDA_SUCCESS;
  }
  if (const CUresult refused = refuse_legacy_during_capture(*stream, true)) return refused;
  wait_for_legacy_rules(stream);
  push(stream, {std::move(work), nullptr, 0});
  if (!driver().settings.deferred) drain(*stream, stream->issued);
  return CUDA_SUCCESS;
}

void issue_wait(const std::shared_ptr<Stream>& stream, const std::shared_ptr<Stream>& other, uint64_t position) {
  if (other != stream && other->completed < position) push(stream, {nullptr, other, position});
}

void drain(Stream& stream, uint64_t position) {
  while (stream.completed < position && !stream.queue.empty()) {
    QueuedWork next = std::move(stream.queue.front());
    stream.queue.pop_front();
    if (!next.work) {
      drain(*next.wait_stream, next.wait_position);
    } else if (!stream.context->broken) {  // a broken context runs nothing any more
      if (const CUresult result = next.work()) stream.context->broken = result;
    }
    ++stream.completed;
  }
}

void drain_context(const Context& context) {
  for_each_stream(&context, [](const std::shared_ptr<Stream>& stream) { drain(*stream, stream->issued); });
}

void drain_everything() {
  for_each_stream(nullptr, [](const std::shared_ptr<Stream>& stream) { drain(*stream, stream->issued); });
}

void forget_streams() {
  for_each_stream(nullptr, [](const std::shared_ptr<Stream>& stream) {
    stream->queue.clear();  // its work may hold the stream itself
    stream->capture.reset();
  });
  driver().streams.clear();
  driver().all_streams.clear();
}

uint64_t pending_work() {
  uint64_t pending = 0;
  for_each_stream(nullptr, [&](const std::shared_ptr<Stream>& stream) { pending += stream->queue.size(); });
  return pending;
}

CUresult wait_for(const std::shared_ptr<Stream>& stream) {
  if (stream->capture) {
    stream->capture->invalidated = true;
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  if (const CUresult refused = refuse_legacy_during_capture(*stream, true)) return refused;
  ++counters().syncs;
  drain(*stream, stream->issued);
  return stream->context->broken;
}

}  // namespace driver
}  // namespace gradclip

using namespace gradclip::driver;

DRIVER_API CUresult cuStreamCreate(CUstream* out, unsigned flags) {
  ContextCall call(__func__);
  return call.refused ? call.refused : create_stream(out, flags, call.context);
}

DRIVER_API CUresult cuStreamCreateWithPriority(CUstream* out, unsigned flags, int) {
  ContextCall call(__func__);
  return call.refused ? call.refused : create_stream(out, flags, call.context);
}

// Returns at once; what is queued still runs.
DRIVER_API CUresult cuStreamDestroy_v2(CUstream handle) {
  Call call(__func__);
  if (call.refused) return call.refused;
  const auto stream = find_handle(driver().streams, handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (stream->capture) stream->capture->invalidated = true;
  // Queued work keeps it alive in the context's legacy stream, which waits for it like for any other.
  issue_wait(stream->context->legacy, stream, stream->issued);
  driver().streams.erase(stream.get());
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuStreamSynchronize(CUstream handle) {
  Call call(__func__);
  if (call.refused) return call.refused;
  std::shared_ptr<Stream> stream;
  if (const CUresult result = find_stream(handle, stream)) return result;
  return wait_for(stream);
}

DRIVER_API CUresult cuStreamQuery(CUstream handle) {
  Call call(__func__);
  if (call.refused) return call.refused;
  std::shared_ptr<Stream> stream;
  if (const CUresult result = find_stream(handle, stream)) return result;
  if (stream->capture) {
    stream->capture->invalidated = true;
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  if (const CUresult refused = refuse_legacy_during_capture(*stream, true)) return refused;
  return stream->completed < stream->issued ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS;
}

DRIVER_API CUresult cuStreamGetCtx(CUstream handle, CUcontext* context) {
  Call call(__func__);
  if (call.refused) return call.refused;
  std::shared_ptr<Stream> stream;
  if (const CUresult result = find_stream(handle, stream)) return result;
  *context = to_handle(stream->context);
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuStreamGetDevice(CUstream handle, CUdevice* device) {
  Call call(__func__);
  if (call.refused) return call.refused;
  std::shared_ptr<Stream> stream;
  if (const CUresult result = find_stream(handle, stream)) return result;
  *device = stream->context->device;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuStreamGetFlags(CUstream handle, unsigned* flags) {
  Call call(__func__);
  if (call.refused) return call.refused;
  std::shared_ptr<Stream> stream;
  if (const CUresult result = find_stream(handle, stream)) return result;
  *flags = stream->flags;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuStreamGetPriority(CUstream handle, int* priority) {
  Call call(__func__);
  if (call.refused) return call.refused;
  std::shared_ptr<Stream> stream;
  if (const CUresult result = find_stream(handle, stream)) return result;
  *priority = 0;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuStreamGetId(CUstream handle, unsigned long long* id) {
  Call call(__func__);
  if (call.refused) return call.refused;
  std::shared_ptr<Stream> stream;
  if (const CUresult result = find_stream(handle, stream)) return result;
  *id = reinterpret_cast<uintptr_t>(stream.get());
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuLaunchHostFunc(CUstream handle, void (*function)(void*), void* argument) {
  Call call(__func__);
  if (call.refused) return call.refused;
  std::shared_ptr<Stream> stream;
  if (const CUresult result = find_stream(handle, stream)) return result;
  return issue(stream, kHostNode, [function, argument] {
    function(argument);
    return CUDA_SUCCESS;
  });
}
