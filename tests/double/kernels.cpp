// The kernels of the crate, compiled as C++, and the list of them.
#include "host_kernels.h"

#include "../../kernels/norm_partials.cu"
#include "../../kernels/norm_partials_p.cu"
#include "../../kernels/clip_coef.cu"
#include "../../kernels/scale.cu"
#include "../../kernels/scale_into.cu"
#include "../../kernels/clamp.cu"
#include "../../kernels/scoped.cu"
#include "../../kernels/scoped_stats.cu"
#include "../../kernels/scoped_p.cu"
#include "../../kernels/scoped_clamp.cu"
#include "../../kernels/shards.cu"

#define TILE_KERNEL(symbol) host_kernel<&::symbol>(#symbol, kTileThreads)
#define FOLD_KERNEL(symbol) host_kernel<&::symbol>(#symbol, kFoldThreads)

namespace gradclip {
namespace host {

const HostKernel project_kernels[] = {
    TILE_KERNEL(norm_partials_l1),
    TILE_KERNEL(norm_partials_l2),
    TILE_KERNEL(norm_partials_inf),
    TILE_KERNEL(norm_partials_p),
    FOLD_KERNEL(clip_coef),
    FOLD_KERNEL(clip_coef_p),
    FOLD_KERNEL(clip_coef_rms),
    host_kernel<&::clip_coef_of_norm>("clip_coef_of_norm", kWarpThreads),
    TILE_KERNEL(scale),
    TILE_KERNEL(scale_into),
    TILE_KERNEL(scale_any),
    TILE_KERNEL(clamp),
    FOLD_KERNEL(clamp_counts),
    TILE_KERNEL(scoped_partials_l1),
    TILE_KERNEL(scoped_partials_l2),
    TILE_KERNEL(scoped_partials_inf),
    TILE_KERNEL(scoped_stats_l1),
    TILE_KERNEL(scoped_stats_l2),
    TILE_KERNEL(scoped_stats_inf),
    FOLD_KERNEL(scoped_coefs),
    FOLD_KERNEL(scoped_coefs_stats),
    TILE_KERNEL(scoped_scale),
    TILE_KERNEL(scoped_partials_p),
    TILE_KERNEL(scoped_stats_p),
    FOLD_KERNEL(scoped_coefs_p),
    FOLD_KERNEL(scoped_coefs_stats_p),
    TILE_KERNEL(scoped_clamp),
    FOLD_KERNEL(scoped_clamp_counts),
    TILE_KERNEL(weigh_partials),
    FOLD_KERNEL(fold_partials),
    FOLD_KERNEL(fold_partials_p),
    FOLD_KERNEL(clip_coef_of_ranks),
    FOLD_KERNEL(clip_coef_of_ranks_p),
    {},
};

}  // namespace host
}  // namespace gradclip
