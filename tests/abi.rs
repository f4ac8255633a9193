//! kernels/abi.cuh and src/abi.rs say the same: the C++ compiler compares every size, offset and value.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use gradclip::abi::{
    self, ClampBounds, ClipParams, NormPartial, OutputDesc, ReportSlot, ScopedGroup, ScopedHeader, ScopedJobs,
    ScopedTable, ScopedTensor, Stats, StatsSlot, TensorDesc, TensorTable,
};
use gradclip::Dtype;
use std::mem::{offset_of, size_of};
use std::path::Path;
use support::toolchain::{Build, Compiler};

/// Lines of static_assert for a struct and its fields.
macro_rules! layout {
    ($out:ident, $type:ident { $($field:ident),* }) => {
        $out.push(format!("sizeof({}) == {}", stringify!($type), size_of::<$type>()));
        $($out.push(format!(
            "__builtin_offsetof({}, {}) == {}",
            stringify!($type), stringify!($field), offset_of!($type, $field)
        ));)*
    };
}

fn compiles(compiler: &Compiler, name: &str, source: &str) -> anyhow::Result<()> {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.cpp"));
    std::fs::write(&path, source)?;
    let include = concat!("-I", env!("CARGO_MANIFEST_DIR"), "/kernels");
    let build = Build {
        file_name: name,
        sources: &[path.to_str().unwrap()],
        compile_flags: &["-fPIC", include],
        link_flags: &["-shared".into()],
    };
    compiler.build(&build).map(drop)
}

#[test]
fn both_halves_of_the_abi_agree() {
    let Some(compiler) = support::toolchain::compiler() else {
        support::toolchain::skip("no C++ compiler was found");
        return;
    };
    let mut claims = Vec::new();
    layout!(claims, TensorDesc { address, numel, first_tile, dtype });
    layout!(claims, TensorTable { num_tensors, in_memory, inline_tensors });
    layout!(claims, OutputDesc { address, dtype, reserved });
    layout!(claims, ClipParams { max_norm, max_norm_at, eps, p, loss_scale, loss_scale_at, norm_type, nonfinite });
    layout!(claims, ClampBounds { lo_f64, hi_f64, lo_f32, hi_f32, lo_f16, hi_f16, lo_bf16, hi_bf16 });
    layout!(
        claims,
        ReportSlot {
            total_norm,
            clip_coef,
            multiplier,
            first_bad_tile,
            clipped_elements,
            nan_elements,
            multiplier_f32,
            found_inf,
            coef_hi,
            coef_lo,
            action,
            rank
        }
    );
    layout!(
        claims,
        ScopedTensor { address, row_numel, first_tile, num_tiles, tiles_per_row, first_group, dtype, index }
    );
    layout!(claims, NormPartial { sum, scale, order, tag });
    layout!(claims, ScopedGroup { max_norm, numel, first_tile, num_tiles });
    layout!(claims, Stats { max_abs, zeros, nonfinite, first_nonfinite });
    layout!(claims, StatsSlot { norm, stats });
    layout!(claims, ScopedHeader { call });
    layout!(claims, ScopedTable { tensors, num_tensors });
    layout!(claims, ScopedJobs { groups, num_groups, num_stats, sums, scales, tile_stats, reports, tensor_stats });
    let values: [(&str, u64); 37] = [
        ("kPackBytes", abi::PACK_BYTES as u64),
        ("kWarpThreads", abi::WARP_THREADS as u64),
        ("kRowsPerSegment", abi::ROWS_PER_SEGMENT as u64),
        ("kSegmentsPerTile", abi::SEGMENTS_PER_TILE as u64),
        ("kRowBytes", abi::ROW_BYTES as u64),
        ("kSegmentBytes", abi::SEGMENT_BYTES as u64),
        ("kTileBytes", abi::TILE_BYTES as u64),
        ("kTileThreads", abi::TILE_THREADS as u64),
        ("kFoldThreads", abi::FOLD_THREADS as u64),
        ("kInlineTensors", abi::INLINE_TENSORS as u64),
        ("kNoTile", abi::NO_TILE),
        ("kNoElement", abi::NO_ELEMENT),
        ("kSameThreshold", abi::SAME_THRESHOLD),
        ("kNoRank", u64::from(abi::NO_RANK)),
        ("kRankRefused", u64::from(abi::RANK_REFUSED)),
        ("kRankOfOtherOrder", u64::from(abi::RANK_OF_OTHER_ORDER)),
        ("kMeasured", abi::MEASURED),
        ("kRefused", abi::REFUSED),
        ("kF32", Dtype::F32 as u64),
        ("kF64", Dtype::F64 as u64),
        ("kF16", Dtype::F16 as u64),
        ("kBF16", Dtype::BF16 as u64),
        ("kL1", u64::from(abi::norm_type::L1)),
        ("kL2", u64::from(abi::norm_type::L2)),
        ("kInf", u64::from(abi::norm_type::INF)),
        ("kP", u64::from(abi::norm_type::P)),
        ("kRms", u64::from(abi::norm_type::RMS)),
        ("kSkip", u64::from(abi::nonfinite::SKIP)),
        ("kZero", u64::from(abi::nonfinite::ZERO)),
        ("kPropagate", u64::from(abi::nonfinite::PROPAGATE)),
        ("kKeep", u64::from(abi::action::KEEP)),
        ("kScale", u64::from(abi::action::SCALE)),
        ("kClear", u64::from(abi::action::CLEAR)),
        ("kPoison", u64::from(abi::action::POISON)),
        ("(sizeof(TensorTable) + sizeof(ClampBounds) + 32 <= 4096)", 1),
        ("alignof(TensorTable)", 8),
        ("alignof(ReportSlot)", 8),
    ];
    claims.extend(values.iter().map(|(name, value)| format!("static_cast<u64>({name}) == {value}ull")));
    let asserts: String = claims.iter().map(|claim| format!("static_assert({claim}, R\"({claim})\");\n")).collect();
    let source = format!("#include \"abi.cuh\"\nnamespace gradclip {{\n{asserts}}}\n");
    compiles(compiler, "abi", &source).unwrap();
    // And the check can fail.
    let wrong = source.replace("kTileBytes) == 32768", "kTileBytes) == 32767");
    assert_ne!(wrong, source);
    assert!(compiles(compiler, "abi_wrong", &wrong).is_err());
}
