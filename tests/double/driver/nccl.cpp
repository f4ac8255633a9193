// The functions of NCCL that cudarc and the crate reach, over the streams of the driver double. Ranks are threads of one
// process, also several on one device, which the real one refuses.
//
// A collective returns when all ranks have made it, where the real one returns at once; what it does happens in the order
// of the streams: each rank's bytes are taken when its stream gets there, and given out when those of all have.
#include <chrono>
#include <condition_variable>
#include <cstring>

#include "call.h"
#include "memory.h"

namespace gradclip {
namespace driver {

namespace {

enum : int { ncclSuccess = 0, ncclUnhandledCudaError = 1, ncclInvalidArgument = 4, ncclRemoteError = 6 };

constexpr std::chrono::seconds kPatience(30);  // a rank that never comes is an error, not a test that hangs

// One collective, of all ranks.
struct Gathering {
  std::vector<std::vector<char>> bytes;             // of each rank, once its stream has got there
  std::vector<std::shared_ptr<Stream>> streams;     // of each rank that has called
  std::vector<uint64_t> positions;
  int arrived = 0;
  bool failed = false;
};

struct Group {
  int size = 0;
  std::vector<uint64_t> calls;  // of each rank
  std::map<uint64_t, std::shared_ptr<Gathering>> gatherings;
};

}  // namespace

struct Communicator {
  std::shared_ptr<Group> group;
  int rank = 0;
};

namespace {

struct Nccl {
  std::mutex mutex;
  std::condition_variable changed;
  std::map<uint64_t, std::shared_ptr<Group>> groups;
  uint64_t next_id = 1;
};

Nccl& nccl() {
  static Nccl* nccl = new Nccl;  // never destroyed, as the driver's state
  return *nccl;
}

// An injected failure has a code of NCCL's; what the driver refuses has one of its own.
int nccl_code(CUresult code) { return code < 10 ? code : ncclUnhandledCudaError; }

CUresult copy_out(const Gathering& gathering, char* to) {
  for (size_t rank = 0; rank < gathering.streams.size(); ++rank) {
    if (gathering.streams[rank]) drain(*gathering.streams[rank], gathering.positions[rank]);
    if (!is_device_range(reinterpret_cast<uint64_t>(to), gathering.bytes[rank].size())) return CUDA_ERROR_ILLEGAL_ADDRESS;
    std::memcpy(to, gathering.bytes[rank].data(), gathering.bytes[rank].size());
    to += gathering.bytes[rank].size();
  }
  return CUDA_SUCCESS;
}

}  // namespace
}  // namespace driver
}  // namespace gradclip

using namespace gradclip::driver;

struct ncclUniqueId {
  char internal[128];
};
using ncclComm_t = Communicator*;

DRIVER_API int ncclGetVersion(int* version) {
  *version = 23000;
  return ncclSuccess;
}

DRIVER_API int ncclGetUniqueId(ncclUniqueId* id) {
  const Call call("ncclGetUniqueId", false);
  if (call.refused) return nccl_code(call.refused);
  std::lock_guard<std::mutex> lock(nccl().mutex);
  *id = {};
  const uint64_t number = nccl().next_id++;
  std::memcpy(id->internal, &number, sizeof(number));
  return ncclSuccess;
}

DRIVER_API int ncclCommInitRank(ncclComm_t* comm, int size, ncclUniqueId id, int rank) {
  {
    const Call call("ncclCommInitRank", false);
    if (call.refused) return nccl_code(call.refused);
  }
  if (size < 1 || rank < 0 || rank >= size) return ncclInvalidArgument;
  uint64_t number;
  std::memcpy(&number, id.internal, sizeof(number));
  std::lock_guard<std::mutex> lock(nccl().mutex);
  auto& group = nccl().groups[number];
  if (!group) {
    group = std::make_shared<Group>();
    group->size = size;
    group->calls.resize(size);
  }
  if (group->size != size) return ncclInvalidArgument;
  *comm = new Communicator{group, rank};
  return ncclSuccess;
}

DRIVER_API int ncclCommInitAll(ncclComm_t* comms, int size, const int*) {
  ncclUniqueId id;
  if (const int error = ncclGetUniqueId(&id)) return error;
  for (int rank = 0; rank < size; ++rank) {
    if (const int error = ncclCommInitRank(&comms[rank], size, id, rank)) return error;
  }
  return ncclSuccess;
}

DRIVER_API int ncclCommAbort(ncclComm_t comm) {
  delete comm;
  return ncclSuccess;
}

// `type` is that of bytes (ncclUint8), the only one that the crate sends.
DRIVER_API int ncclAllGather(const void* send, void* receive, size_t count, int type, ncclComm_t comm, CUstream handle) {
  constexpr int kUint8 = 1;
  if (type != kUint8) return ncclInvalidArgument;
  Nccl& state = nccl();
  Group& group = *comm->group;
  std::shared_ptr<Gathering> gathering;
  {
    std::lock_guard<std::mutex> lock(state.mutex);
    auto& place = group.gatherings[group.calls[comm->rank]++];
    if (!place) {
      place = std::make_shared<Gathering>();
      place->bytes.resize(group.size);
      place->streams.resize(group.size);
      place->positions.resize(group.size);
    }
    gathering = place;
  }
  int failed = ncclSuccess;
  {
    const ContextCall call("ncclAllGather");
    failed = call.refused;
    std::shared_ptr<Stream> stream;
    if (!failed) failed = find_stream(handle, stream);
    if (!failed) {
      const int rank = comm->rank;
      failed = issue(stream, kMemcpyNode, [gathering, rank, send, count]() -> CUresult {
        if (!is_device_range(reinterpret_cast<uint64_t>(send), count)) return CUDA_ERROR_ILLEGAL_ADDRESS;
        const char* begin = static_cast<const char*>(send);
        gathering->bytes[rank].assign(begin, begin + count);
        return CUDA_SUCCESS;
      });
    }
    if (!failed && !stream->capture) {
      gathering->streams[comm->rank] = stream;
      gathering->positions[comm->rank] = stream->issued;
    }
  }
  {
    std::unique_lock<std::mutex> lock(state.mutex);
    gathering->failed |= failed != ncclSuccess;
    ++gathering->arrived;
    state.changed.notify_all();
    const auto ready = [&] { return gathering->failed || gathering->arrived == group.size; };
    if (!state.changed.wait_for(lock, kPatience, ready)) {
      complain("ncclAllGather: %d of %d ranks have come", gathering->arrived, group.size);
      gathering->failed = true;
      state.changed.notify_all();
    }
    if (failed) return nccl_code(failed);
    if (gathering->failed) return ncclRemoteError;
  }
  std::lock_guard<std::recursive_mutex> lock(driver().mutex);
  std::shared_ptr<Stream> stream;
  if (const CUresult error = find_stream(handle, stream)) return nccl_code(error);
  return nccl_code(issue(stream, kMemcpyNode,
                         [gathering, receive]() { return copy_out(*gathering, static_cast<char*>(receive)); }));
}
