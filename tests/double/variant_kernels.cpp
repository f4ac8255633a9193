// The kernels of benches/variants, compiled as C++.
#include "host_kernels.h"

#include "../../benches/variants/norm_loads.cu"
#include "../../benches/variants/norm_async.cu"
#include "../../benches/variants/norm_keep_end.cu"
#include "../../benches/variants/last_block.cu"
#include "../../benches/variants/cooperative.cu"
#include "../../benches/variants/second_pass.cu"
#include "../../benches/variants/wide.cu"
#include "../../benches/variants/stats_loads_first.cu"

#define TILE_KERNEL(symbol) host_kernel<&::symbol>(#symbol, kTileThreads)

namespace gradclip {
namespace host {

const HostKernel variant_kernels[] = {
    TILE_KERNEL(norm_batch_4),
    TILE_KERNEL(norm_next_tile),
    TILE_KERNEL(norm_async),
    TILE_KERNEL(norm_keep_end),
    TILE_KERNEL(norm_last_block),
    TILE_KERNEL(clip_cooperative),
    TILE_KERNEL(scale_reverse),
    TILE_KERNEL(scale_changed),
    TILE_KERNEL(clamp_stores_all),
    host_kernel<&::norm_wide>("norm_wide", variants::kWideThreads),
    TILE_KERNEL(scale_wide),
    TILE_KERNEL(stats_loads_first),
    {},
};

}  // namespace host
}  // namespace gradclip
