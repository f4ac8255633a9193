//! What each variant does otherwise than the library.

use super::measure::cases::Op;

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    Call(Op),
    /// Only the launches of one kernel in a call of the library, by the kernel's name in `variants.json`.
    #[allow(dead_code)] // the predictions use it
    Alone(Op, &'static str),
    /// The pass that leaves statistics of each tensor besides its norm.
    Telemetry,
}

impl What {
    pub fn name(self) -> &'static str {
        match self {
            Self::Call(op) | Self::Alone(op, _) => op.name(),
            Self::Telemetry => "telemetry",
        }
    }

    pub fn needs_restored(self) -> bool {
        matches!(self, Self::Call(op) | Self::Alone(op, _) if op.needs_restored())
    }
}

/// How many blocks walk the tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grid {
    OneATile,
    /// As many for each multiprocessor, and no more than tiles.
    Multiprocessor(u32),
}

/// Which stages share a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stages {
    Apart,
    /// The norm's last block does the second stage.
    LastBlock,
    /// All in one.
    Cooperative,
}

/// Kernels by their names in `variants.json`, and how they are launched.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub norm: &'static str,
    pub norm_threads: u32,
    pub norm_grid: Grid,
    /// The norm has one parameter more, the tile from which the L2 cache is to keep them.
    pub keeps_end: bool,
    pub clip_coef: &'static str,
    pub scale: &'static str,
    pub clamp: &'static str,
    pub in_place_grid: Grid,
    pub stats: &'static str,
    pub stages: Stages,
    pub programmatic: bool,
    pub table_in_memory: bool,
}

/// What `src/cuda/launch.rs` does.
pub const LIBRARY: Plan = Plan {
    norm: "norm",
    norm_threads: 256,
    norm_grid: Grid::OneATile,
    keeps_end: false,
    clip_coef: "clip_coef",
    scale: "scale",
    clamp: "clamp",
    in_place_grid: Grid::Multiprocessor(16),
    stats: "stats",
    stages: Stages::Apart,
    programmatic: false,
    table_in_memory: false,
};

pub struct Variant {
    /// A key of the changes in `variants.json`.
    pub change: &'static str,
    pub name: &'static str,
    pub whats: &'static [What],
    /// Bytes of the lists it is measured on.
    pub bytes: [usize; 2],
    pub plan: Plan,
}

const NORM: &[What] = &[What::Call(Op::Norm)];
const CLIP: &[What] = &[What::Call(Op::Clip)];
const CLIPS: &[What] = &[What::Call(Op::ClipWithin), What::Call(Op::Clip)];
const NORM_AND_CLIP: &[What] = &[What::Call(Op::Norm), What::Call(Op::Clip)];
const VALUE: &[What] = &[What::Call(Op::Value0), What::Call(Op::Value1), What::Call(Op::Value100)];
const IN_PLACE: &[What] = &[What::Call(Op::ClipWithin), What::Call(Op::Clip), What::Call(Op::Value1)];
const TELEMETRY: &[What] = &[What::Telemetry];

const MI: usize = 1 << 20;
const BANDWIDTH: [usize; 2] = [16 * MI, usize::MAX];
const LAUNCHES: [usize; 2] = [0, 256 * MI];
const CACHE: [usize; 2] = [16 * MI, 4096 * MI];

/// By change, in the order in which they are measured.
pub fn variants() -> Vec<Variant> {
    let mut all = Vec::new();
    let mut add = |change, whats, bytes, named: &[(&'static str, Plan)]| {
        all.extend(named.iter().map(|(name, plan)| Variant { change, name, whats, bytes, plan: *plan }));
    };
    let norm = |norm| Plan { norm, ..LIBRARY };
    let scale = |scale| Plan { scale, ..LIBRARY };
    let stays = |blocks, plan| Plan { norm_grid: Grid::Multiprocessor(blocks), ..plan };
    let in_place = |in_place_grid| Plan { in_place_grid, ..LIBRARY };

    let last_block = Plan { norm: "last block", stages: Stages::LastBlock, ..LIBRARY };
    let programmatic = Plan {
        norm: "norm, programmatic",
        clip_coef: "clip_coef, programmatic",
        scale: "scale, programmatic",
        programmatic: true,
        ..LIBRARY
    };
    let both =
        Plan { norm: "last block, programmatic", scale: "scale, programmatic", programmatic: true, ..last_block };
    add("last block", NORM_AND_CLIP, LAUNCHES, &[("last block", last_block)]);
    add("programmatic launch", NORM, LAUNCHES, &[("programmatic launch", programmatic)]);
    add(
        "programmatic launch",
        CLIPS,
        LAUNCHES,
        &[("programmatic launch", programmatic), ("last block, programmatic launch", both)],
    );
    let cooperative = Plan { norm: "cooperative", stages: Stages::Cooperative, ..LIBRARY };
    add("cooperative launch", CLIPS, LAUNCHES, &[("cooperative launch", cooperative)]);

    add("reverse order", CLIP, [16 * MI, usize::MAX], &[("reverse order", scale("scale, reverse"))]);
    let keep_end = Plan { norm: "norm, keep end", keeps_end: true, scale: "scale, reverse, streaming", ..LIBRARY };
    add(
        "cache hints",
        CLIP,
        CACHE,
        &[
            ("streaming", scale("scale, streaming")),
            ("reverse order, streaming", scale("scale, reverse, streaming")),
            // Last: what it asks the cache to keep may stay there for a while.
            ("reverse order, streaming, end of the first pass kept", keep_end),
        ],
    );

    add(
        "loads in flight",
        NORM,
        BANDWIDTH,
        &[
            ("4 loads", norm("norm, 4 loads")),
            ("next tile", stays(2, norm("norm, next tile"))),
            ("shared memory", norm("norm, shared memory")),
            ("shared memory, 6 blocks that stay", stays(6, norm("norm, shared memory"))),
        ],
    );
    add(
        "blocks a multiprocessor",
        NORM,
        BANDWIDTH,
        &[
            ("norm, 5 blocks", norm("norm, 5 blocks")),
            ("norm, 6 blocks", norm("norm, 6 blocks")),
            ("norm, 4 blocks that stay", stays(4, LIBRARY)),
        ],
    );
    add("blocks a multiprocessor", CLIP, BANDWIDTH, &[("scale, 3 blocks", scale("scale, 3 blocks"))]);
    add(
        "blocks a multiprocessor",
        &[What::Call(Op::Value1)],
        BANDWIDTH,
        &[("clamp, 3 blocks", Plan { clamp: "clamp, 3 blocks", ..LIBRARY })],
    );
    add(
        "blocks a multiprocessor",
        IN_PLACE,
        BANDWIDTH,
        &[
            ("second pass, grid of 8", in_place(Grid::Multiprocessor(8))),
            ("second pass, grid of 32", in_place(Grid::Multiprocessor(32))),
            ("second pass, one block a tile", in_place(Grid::OneATile)),
        ],
    );

    add("stores left out", CLIP, BANDWIDTH, &[("scale, changed only", scale("scale, changed only"))]);
    let stores_all = Plan { clamp: "clamp, stores all", ..LIBRARY };
    add("stores left out", VALUE, BANDWIDTH, &[("clamp, stores all", stores_all)]);
    let in_memory = Plan { table_in_memory: true, ..LIBRARY };
    add("table in memory", CLIPS, LAUNCHES, &[("table in memory", in_memory)]);
    add(
        "telemetry",
        TELEMETRY,
        BANDWIDTH,
        &[
            ("2 blocks", Plan { stats: "stats, 2 blocks", ..LIBRARY }),
            ("4 blocks", Plan { stats: "stats, 4 blocks", ..LIBRARY }),
            ("loads first", Plan { stats: "stats, loads first", ..LIBRARY }),
        ],
    );
    let wide_norm = Plan { norm: "norm, 256 bits", norm_threads: 128, ..LIBRARY };
    add("256 bits", NORM, BANDWIDTH, &[("norm, 256 bits", wide_norm)]);
    add("256 bits", CLIP, BANDWIDTH, &[("scale, 256 bits", scale("scale, 256 bits"))]);
    all
}
