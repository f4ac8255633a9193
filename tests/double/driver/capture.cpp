// Stream capture: what the driver allows during one, and what it makes of mistakes.
#include "call.h"

namespace gradclip {
namespace driver {

namespace {

thread_local int thread_capture_mode = kCaptureGlobal;

std::vector<std::shared_ptr<Graph>> active_captures() {
  std::vector<std::shared_ptr<Graph>> active;
  for (const auto& weak : driver().captures) {
    if (const auto graph = weak.lock()) active.push_back(graph);
  }
  return active;
}

void leave_capture(const std::shared_ptr<Graph>& graph) {
  for (const auto& weak : graph->streams) {
    if (const auto stream = weak.lock()) {
      stream->capture.reset();
      stream->captured_nodes = 0;
      stream->joined = true;
    }
  }
  auto& captures = driver().captures;
  for (size_t i = 0; i < captures.size();) {
    const auto other = captures[i].lock();
    if (!other || other == graph) {
      captures.erase(captures.begin() + static_cast<std::ptrdiff_t>(i));
    } else {
      ++i;
    }
  }
}

CUresult begin_capture(CUstream handle, int mode) {
  std::shared_ptr<Stream> stream;
  if (const CUresult result = find_stream(handle, stream)) return result;
  if (mode < kCaptureGlobal || mode > kCaptureRelaxed) return CUDA_ERROR_INVALID_VALUE;
  if (stream->legacy) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (stream->capture) return CUDA_ERROR_INVALID_VALUE;
  auto graph = std::make_shared<Graph>();
  graph->mode = mode;
  graph->thread = std::this_thread::get_id();
  graph->id = ++driver().captures_begun;
  graph->streams.push_back(stream);
  stream->capture = graph;
  stream->captured_nodes = 0;
  driver().captures.push_back(graph);
  return CUDA_SUCCESS;
}

CUresult capture_info(CUstream handle, int* status, uint64_t* id, CUgraph* graph) {
  std::shared_ptr<Stream> stream;
  if (const CUresult result = find_stream(handle, stream)) return result;
  if (const CUresult refused = refuse_legacy_during_capture(*stream, false)) return refused;
  const Graph* capture = stream->capture.get();
  *status = !capture ? kCaptureNone : capture->invalidated ? kCaptureInvalidated : kCaptureActive;
  if (id) *id = capture ? capture->id : 0;
  if (graph) *graph = reinterpret_cast<CUgraph>(const_cast<Graph*>(capture));
  return CUDA_SUCCESS;
}

}  // namespace

CUresult refuse_during_capture() {
  for (const auto& graph : active_captures()) {
    const bool mine = graph->thread == std::this_thread::get_id();
    bool refused = false;
    if (thread_capture_mode == kCaptureGlobal) refused = graph->mode == kCaptureGlobal;
    if (thread_capture_mode != kCaptureRelaxed && mine) refused |= graph->mode != kCaptureRelaxed;
    if (refused) {
      graph->invalidated = true;
      return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
  }
  return CUDA_SUCCESS;
}

CUresult join_capture(const std::shared_ptr<Stream>& stream, const EventRecord& record) {
  if (!record.capture || !record.stream->capture) {
    if (record.capture) return CUDA_ERROR_CAPTURED_EVENT;  // of a capture that has ended
    stream->capture->invalidated = true;
    return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
  }
  if (stream->capture && stream->capture != record.capture) {
    stream->capture->invalidated = record.capture->invalidated = true;
    return CUDA_ERROR_STREAM_CAPTURE_MERGE;
  }
  if (record.capture->invalidated) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  if (!stream->capture) {
    if (stream->legacy) return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    stream->capture = record.capture;
    stream->captured_nodes = 0;
    stream->joined = false;
    record.capture->streams.push_back(stream);
  }
  if (record.stream != stream && record.position == record.stream->captured_nodes) record.stream->joined = true;
  return CUDA_SUCCESS;
}

}  // namespace driver
}  // namespace gradclip

using namespace gradclip::driver;

DRIVER_API CUresult cuStreamBeginCapture_v2(CUstream stream, int mode) {
  Call call(__func__);
  return call.refused ? call.refused : begin_capture(stream, mode);
}

DRIVER_API CUresult cuStreamEndCapture(CUstream handle, CUgraph* out) {
  Call call(__func__);
  if (call.refused) return call.refused;
  *out = nullptr;
  std::shared_ptr<Stream> stream;
  if (const CUresult result = find_stream(handle, stream)) return result;
  const auto graph = stream->capture;
  if (!graph) return CUDA_ERROR_INVALID_VALUE;
  if (graph->streams.front().lock() != stream) return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
  if (graph->mode != kCaptureRelaxed && graph->thread != std::this_thread::get_id()) {
    return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
  }
  bool unjoined = false;
  for (const auto& weak : graph->streams) {
    const auto other = weak.lock();
    unjoined |= other && other != stream && !other->joined;
  }
  leave_capture(graph);
  if (graph->invalidated) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  if (unjoined) return CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
  *out = add_handle<Graph, CUgraph>(driver().graphs, graph);
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuStreamIsCapturing(CUstream handle, int* status) {
  Call call(__func__);
  return call.refused ? call.refused : capture_info(handle, status, nullptr, nullptr);
}

DRIVER_API CUresult cuStreamGetCaptureInfo_v2(CUstream stream, int* status, uint64_t* id, CUgraph* graph,
                                              const CUgraphNode** dependencies, size_t* num_dependencies) {
  Call call(__func__);
  if (call.refused) return call.refused;
  if (dependencies) *dependencies = nullptr;
  if (num_dependencies) *num_dependencies = 0;
  return capture_info(stream, status, id, graph);
}

DRIVER_API CUresult cuStreamGetCaptureInfo_v3(CUstream stream, int* status, uint64_t* id, CUgraph* graph,
                                              const CUgraphNode** dependencies, const void** edges,
                                              size_t* num_dependencies) {
  Call call(__func__);
  if (call.refused) return call.refused;
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (num_dependencies) *num_dependencies = 0;
  return capture_info(stream, status, id, graph);
}

DRIVER_API CUresult cuThreadExchangeStreamCaptureMode(int* mode) {
  Call call(__func__);
  if (call.refused) return call.refused;
  std::swap(*mode, thread_capture_mode);
  return CUDA_SUCCESS;
}
