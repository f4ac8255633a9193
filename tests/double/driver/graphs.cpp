// Graphs: a captured list of work that can be replayed.
#include "call.h"

namespace gradclip {
namespace driver {

namespace {

CUresult instantiate(CUgraphExec* out, CUgraph handle) {
  const auto graph = find_handle(driver().graphs, handle);
  if (!graph) return CUDA_ERROR_INVALID_HANDLE;
  ++counters().graph_instantiations;
  auto exec = std::make_shared<GraphExec>();
  exec->nodes = graph->nodes;
  *out = add_handle<GraphExec, CUgraphExec>(driver().graph_execs, exec);
  return CUDA_SUCCESS;
}

CUresult run_all(const GraphExec& exec) {
  for (const auto& node : exec.nodes) {
    if (const CUresult result = node->work()) return result;
  }
  return CUDA_SUCCESS;
}

}  // namespace

}  // namespace driver
}  // namespace gradclip

using namespace gradclip::driver;

DRIVER_API CUresult cuGraphInstantiateWithFlags(CUgraphExec* exec, CUgraph graph, unsigned long long) {
  Call call(__func__);
  return call.refused ? call.refused : instantiate(exec, graph);
}

DRIVER_API CUresult cuGraphInstantiate_v2(CUgraphExec* exec, CUgraph graph, CUgraphNode*, char*, size_t) {
  Call call(__func__);
  return call.refused ? call.refused : instantiate(exec, graph);
}

DRIVER_API CUresult cuGraphInstantiateWithParams(CUgraphExec* exec, CUgraph graph, void*) {
  Call call(__func__);
  return call.refused ? call.refused : instantiate(exec, graph);
}

DRIVER_API CUresult cuGraphLaunch(CUgraphExec handle, CUstream stream_handle) {
  Call call(__func__);
  if (call.refused) return call.refused;
  const auto exec = find_handle(driver().graph_execs, handle);
  if (!exec) return CUDA_ERROR_INVALID_HANDLE;
  std::shared_ptr<Stream> stream;
  if (const CUresult result = find_stream(stream_handle, stream)) return result;
  ++counters().graph_launches;
  return issue(stream, kHostNode, [exec] { return run_all(*exec); });
}

DRIVER_API CUresult cuGraphUpload(CUgraphExec handle, CUstream stream_handle) {
  Call call(__func__);
  if (call.refused) return call.refused;
  std::shared_ptr<Stream> stream;
  if (const CUresult result = find_stream(stream_handle, stream)) return result;
  return find_handle(driver().graph_execs, handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

DRIVER_API CUresult cuGraphExecDestroy(CUgraphExec handle) {
  Call call(__func__);
  if (call.refused) return call.refused;
  return driver().graph_execs.erase(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

DRIVER_API CUresult cuGraphDestroy(CUgraph handle) {
  Call call(__func__);
  if (call.refused) return call.refused;
  return driver().graphs.erase(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

// Nodes are valid while their graph is.
DRIVER_API CUresult cuGraphGetNodes(CUgraph handle, CUgraphNode* nodes, size_t* num_nodes) {
  Call call(__func__);
  if (call.refused) return call.refused;
  const auto graph = find_handle(driver().graphs, handle);
  if (!graph) return CUDA_ERROR_INVALID_HANDLE;
  if (nodes) {
    for (size_t i = 0; i < *num_nodes; ++i) {
      nodes[i] = i < graph->nodes.size() ? reinterpret_cast<CUgraphNode>(graph->nodes[i].get()) : nullptr;
    }
  }
  if (!nodes || *num_nodes > graph->nodes.size()) *num_nodes = graph->nodes.size();
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuGraphNodeGetType(CUgraphNode handle, int* type) {
  Call call(__func__);
  if (call.refused) return call.refused;
  for (const auto& graph : driver().graphs) {
    for (const auto& node : graph.second->nodes) {
      if (reinterpret_cast<CUgraphNode>(node.get()) == handle) {
        *type = node->type;
        return CUDA_SUCCESS;
      }
    }
  }
  return CUDA_ERROR_INVALID_HANDLE;
}
