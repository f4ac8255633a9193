// What the driver knows: contexts, streams with their queues, events, graphs, modules. One lock over all of it.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "../host_kernels.h"
#include "api.h"
#include "control.h"

namespace gradclip {
namespace driver {

constexpr int kDevices = 2;

struct Stream;

struct Context {
  int device = 0;
  bool primary = false;
  unsigned retained = 0;  // a context that nobody retains is destroyed
  uint64_t id = 0;        // another one each time it is made, at whatever address
  unsigned flags = 0;
  CUresult broken = 0;  // sticky: what every call in it returns from now on
  std::shared_ptr<Stream> legacy;
  std::map<std::thread::id, std::shared_ptr<Stream>> per_thread;
};

// Something that runs on the device, later or now.
using Work = std::function<CUresult()>;

struct GraphNode {
  NodeType type;
  Work work;
};

struct Graph {
  std::vector<std::shared_ptr<GraphNode>> nodes;  // in the order of capture, which every dependency follows
  std::vector<std::weak_ptr<Stream>> streams;     // taking part in the capture; the first one began it
  bool invalidated = false;
  int mode = kCaptureGlobal;
  std::thread::id thread;
  uint64_t id = 0;
};

struct GraphExec {
  std::vector<std::shared_ptr<GraphNode>> nodes;
};

struct QueuedWork {
  Work work;                            // or, when empty:
  std::shared_ptr<Stream> wait_stream;  // first that stream up to that position
  uint64_t wait_position = 0;
};

struct Stream {
  Context* context = nullptr;
  unsigned flags = 0;
  bool legacy = false;
  std::deque<QueuedWork> queue;
  uint64_t issued = 0, completed = 0;
  std::shared_ptr<Graph> capture;
  uint64_t captured_nodes = 0;
  bool joined = true;  // what it captured is waited for by the stream that began the capture

  bool blocking() const { return !(flags & CU_STREAM_NON_BLOCKING); }
};

struct EventRecord {
  std::shared_ptr<Stream> stream;
  uint64_t position = 0;
  std::shared_ptr<Graph> capture;
  bool done = false;
  double milliseconds = 0.0;
};

struct Event {
  Context* context = nullptr;
  unsigned flags = 0;
  std::shared_ptr<EventRecord> record;
};

struct Module {
  Context* context = nullptr;
  uint64_t context_id = 0;  // of the context it was loaded into, with which it goes
  std::vector<std::string> entries;
};

struct Function {
  Context* context = nullptr;
  Module* module = nullptr;
  const host::HostKernel* kernel = nullptr;
  uint64_t context_id = 0;
};

struct Settings {
  int devices = kDevices;
  int driver_version = 13000;
  int capability_major = 9, capability_minor = 0;
  int multiprocessors = 4;
  bool memory_pools = true;
  uint64_t total_memory = 8ull << 30;
  host::Order order;
  bool deferred = false;
  bool kernels_run = true;
};

template <class Object>
using Handles = std::unordered_map<const void*, std::shared_ptr<Object>>;

struct Driver {
  std::recursive_mutex mutex;
  bool initialized = false;
  uint64_t generation = 1;  // of resets: what a thread remembers from before one is void
  Settings settings;
  Context primary[kDevices];
  Handles<Context> contexts;  // not primary
  Handles<Stream> streams;
  std::vector<std::weak_ptr<Stream>> all_streams;  // also destroyed ones with work left
  Handles<Event> events;
  Handles<Module> modules;
  Handles<Function> functions;
  Handles<Graph> graphs;
  Handles<GraphExec> graph_execs;
  std::vector<std::weak_ptr<Graph>> captures;
  uint64_t captures_begun = 0;
};

Driver& driver();

template <class Object, class Handle>
Handle add_handle(Handles<Object>& handles, std::shared_ptr<Object> object) {
  Object* raw = object.get();
  handles[raw] = std::move(object);
  return reinterpret_cast<Handle>(raw);
}

template <class Object, class Handle>
std::shared_ptr<Object> find_handle(const Handles<Object>& handles, Handle handle) {
  const auto found = handles.find(reinterpret_cast<const void*>(handle));
  return found == handles.end() ? nullptr : found->second;
}

// Streams (streams.cpp).
void init_context(Context& context, int device, bool primary);
CUresult find_stream(CUstream handle, std::shared_ptr<Stream>& out);
// Queues the work, or records it where the stream is capturing; runs it at once unless deferred.
CUresult issue(const std::shared_ptr<Stream>& stream, NodeType type, Work work);
void issue_wait(const std::shared_ptr<Stream>& stream, const std::shared_ptr<Stream>& other, uint64_t position);
void drain(Stream& stream, uint64_t position);
void drain_context(const Context& context);
void drain_everything();
void forget_streams();
uint64_t pending_work();
// The host waits for the stream.
CUresult wait_for(const std::shared_ptr<Stream>& stream);

// Capture (capture.cpp).
CUresult refuse_during_capture();  // for calls that are unsafe in a capture: invalidates it
// The legacy stream cannot be used while a blocking stream of its context captures: the two would depend on each other.
CUresult refuse_legacy_during_capture(const Stream& stream, bool invalidate);
CUresult join_capture(const std::shared_ptr<Stream>& stream, const EventRecord& record);

// Contexts (contexts.cpp).
// Whether a module or function of that context has outlived it; then says so.
bool is_stale(uint64_t context_id, const Context& context);
Context* current_context();
Context* context_from(CUcontext handle);
inline CUcontext to_handle(Context* context) { return reinterpret_cast<CUcontext>(context); }

}  // namespace driver
}  // namespace gradclip
