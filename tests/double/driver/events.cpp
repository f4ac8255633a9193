#include <chrono>

#include "call.h"

namespace gradclip {
namespace driver {

namespace {

double now_in_milliseconds() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

CUresult record_event(CUevent handle, CUstream stream_handle) {
  const auto event = find_handle(driver().events, handle);
  if (!event) return CUDA_ERROR_INVALID_HANDLE;
  std::shared_ptr<Stream> stream;
  if (const CUresult result = find_stream(stream_handle, stream)) return result;
  if (event->context != stream->context) {
    complain("an event of device %d recorded on a stream of device %d", event->context->device,
             stream->context->device);
    return CUDA_ERROR_INVALID_HANDLE;
  }
  ++counters().event_records;
  auto record = std::make_shared<EventRecord>();
  record->stream = stream;
  if (stream->capture) {
    if (stream->capture->invalidated) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    record->capture = stream->capture;
    record->position = stream->captured_nodes;
  } else {
    // The position that the record itself will have: nothing is queued before it but waits.
    std::weak_ptr<EventRecord> weak = record;
    const CUresult result = issue(stream, kHostNode, [weak] {
      if (const auto done = weak.lock()) {
        done->done = true;
        done->milliseconds = now_in_milliseconds();
      }
      return CUDA_SUCCESS;
    });
    if (result) return result;
    record->position = stream->issued;
    if (stream->completed >= record->position && !record->done) record->done = true;
  }
  event->record = record;
  return CUDA_SUCCESS;
}

CUresult elapsed(float* milliseconds, CUevent start_handle, CUevent end_handle) {
  const auto start = find_handle(driver().events, start_handle);
  const auto end = find_handle(driver().events, end_handle);
  if (!start || !end || !start->record || !end->record) return CUDA_ERROR_INVALID_HANDLE;
  if ((start->flags | end->flags) & CU_EVENT_DISABLE_TIMING) return CUDA_ERROR_INVALID_HANDLE;
  if (!start->record->done || !end->record->done) return CUDA_ERROR_NOT_READY;
  *milliseconds = static_cast<float>(end->record->milliseconds - start->record->milliseconds);
  return CUDA_SUCCESS;
}

}  // namespace

}  // namespace driver
}  // namespace gradclip

using namespace gradclip::driver;

DRIVER_API CUresult cuEventCreate(CUevent* out, unsigned flags) {
  ContextCall call(__func__);
  if (call.refused) return call.refused;
  auto event = std::make_shared<Event>();
  event->context = call.context;
  event->flags = flags;
  *out = add_handle<Event, CUevent>(driver().events, event);
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuEventDestroy_v2(CUevent handle) {
  Call call(__func__);
  if (call.refused) return call.refused;
  return driver().events.erase(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

DRIVER_API CUresult cuEventRecord(CUevent event, CUstream stream) {
  Call call(__func__);
  return call.refused ? call.refused : record_event(event, stream);
}

DRIVER_API CUresult cuEventRecordWithFlags(CUevent event, CUstream stream, unsigned) {
  Call call(__func__);
  return call.refused ? call.refused : record_event(event, stream);
}

DRIVER_API CUresult cuEventQuery(CUevent handle) {
  Call call(__func__);
  if (call.refused) return call.refused;
  const auto event = find_handle(driver().events, handle);
  if (!event) return CUDA_ERROR_INVALID_HANDLE;
  if (event->context->broken) return event->context->broken;
  if (event->record && event->record->capture) return CUDA_ERROR_CAPTURED_EVENT;
  if (const CUresult refused = refuse_during_capture()) return refused;
  return !event->record || event->record->done ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

DRIVER_API CUresult cuEventSynchronize(CUevent handle) {
  Call call(__func__);
  if (call.refused) return call.refused;
  const auto event = find_handle(driver().events, handle);
  if (!event) return CUDA_ERROR_INVALID_HANDLE;
  if (event->context->broken) return event->context->broken;
  const auto record = event->record;
  if (record && record->capture) return CUDA_ERROR_CAPTURED_EVENT;
  ++counters().syncs;
  if (record) drain(*record->stream, record->position);
  return event->context->broken;
}

DRIVER_API CUresult cuStreamWaitEvent(CUstream stream_handle, CUevent handle, unsigned) {
  Call call(__func__);
  if (call.refused) return call.refused;
  const auto event = find_handle(driver().events, handle);
  if (!event) return CUDA_ERROR_INVALID_HANDLE;
  std::shared_ptr<Stream> stream;
  if (const CUresult result = find_stream(stream_handle, stream)) return result;
  ++counters().event_waits;
  const auto record = event->record;
  if (!record) return CUDA_SUCCESS;
  if (record->capture || stream->capture) return join_capture(stream, *record);
  issue_wait(stream, record->stream, record->position);
  if (!driver().settings.deferred) drain(*stream, stream->issued);
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end) {
  Call call(__func__);
  return call.refused ? call.refused : elapsed(milliseconds, start, end);
}

DRIVER_API CUresult cuEventElapsedTime_v2(float* milliseconds, CUevent start, CUevent end) {
  Call call(__func__);
  return call.refused ? call.refused : elapsed(milliseconds, start, end);
}
