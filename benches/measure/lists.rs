//! What is measured, the most important first: a budget that runs out leaves out the end.

use super::shapes::{self, Shapes};
use gradclip::Dtype;
use serde::Serialize;
use std::fmt::{self, Display, Formatter};

/// A list of gradients of one type, as it lies in the arena: each tensor starts at a multiple of `ALIGN` bytes, as
/// allocations of PyTorch and of the driver do, and `offset` elements after it.
#[derive(Clone, Serialize)]
pub struct Entry {
    pub list: &'static str,
    pub dtype: &'static str,
    pub offset: usize,
    pub numels: Vec<usize>,
}

pub const ALIGN: usize = 512;

impl Entry {
    pub fn new(shapes: &Shapes, dtype: &'static str, offset: usize) -> Self {
        Self { list: shapes.name, dtype, offset, numels: shapes.numels.clone() }
    }

    pub fn dtype(&self) -> Dtype {
        match self.dtype {
            "f32" => Dtype::F32,
            "f64" => Dtype::F64,
            "f16" => Dtype::F16,
            _ => Dtype::BF16,
        }
    }

    /// Bytes of all gradients together.
    pub fn bytes(&self) -> usize {
        self.numels.iter().sum::<usize>() * self.dtype().size()
    }

    /// Where each gradient starts, in bytes from the start of the arena, and where the arena may end.
    pub fn layout(&self) -> (Vec<usize>, usize) {
        let size = self.dtype().size();
        let mut end = 0;
        let start = |numel: &usize| {
            let start = end + self.offset * size;
            end = (start + numel * size).next_multiple_of(ALIGN);
            start
        };
        (self.numels.iter().map(start).collect(), end)
    }
}

impl Display for Entry {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.list, self.dtype)
    }
}

/// One tensor of that many bytes, in 4-byte elements or in 2-byte ones.
fn bytes(name: &'static str, bytes: usize, dtype: &'static str) -> Entry {
    let size = if dtype == "f32" { 4 } else { 2 };
    Entry::new(&shapes::equal(name, 1, bytes / size), dtype, 0)
}

/// The same list in several types.
fn each(entries: &mut Vec<Entry>, shapes: &Shapes, dtypes: &[&'static str]) {
    entries.extend(dtypes.iter().map(|dtype| Entry::new(shapes, dtype, 0)));
}

/// Elements that a tensor may have for PyTorch: beyond it reads out of bounds (pytorch#169930).
pub const MOST_ELEMENTS_OF_TORCH: usize = (1 << 31) - 1;

const KI: usize = 1 << 10;
const MI: usize = 1 << 20;
const GI: usize = 1 << 30;

/// Of the first entries, which a bar names, as against all others: more time means more rounds.
pub const WEIGHT: usize = 6;
pub const WEIGHTED: usize = 14;

/// The list that is not part of a usual run.
pub const LARGEST: &str = "64 GiB";

/// Share of the time that is left for `indices` which the first of them gets.
pub fn share(indices: &[usize]) -> f64 {
    let weight = |index: &usize| if *index < WEIGHTED { WEIGHT } else { 1 };
    indices.first().map_or(0, weight) as f64 / indices.iter().map(weight).sum::<usize>().max(1) as f64
}

pub fn entries() -> Vec<Entry> {
    let all = &["f32", "bf16", "f16"];
    let usual = &["f32", "bf16"];
    let moe = shapes::shard("Qwen3-30B-A3B 1/32", shapes::qwen3_30b(), 32);

    // The lists that the bars of docs/performance.md name.
    let mut entries: Vec<Entry> = usual.iter().map(|dtype| bytes("1 GiB", GI, dtype)).collect();
    entries.extend(usual.iter().map(|dtype| bytes("1 MiB", MI, dtype)));
    entries.push(Entry::new(&shapes::equal("1 MiB in 160", 160, MI / 160 / 4), "f32", 0));
    entries.push(Entry::new(&shapes::equal("1 MiB in 160", 160, MI / 160 / 2), "bf16", 0));
    each(&mut entries, &shapes::equal("3000 x 4 Ki", 3000, 4 * KI), usual);
    each(&mut entries, &shapes::gpt2(), usual);
    each(&mut entries, &moe, usual);
    // A whole 4 GiB would be one bf16 more than PyTorch takes.
    entries.extend(usual.iter().map(|dtype| bytes("4 GiB", 4 * GI - ALIGN, dtype)));

    // The bars name these too: all that is large.
    for (dtype, size) in [("f32", 4), ("bf16", 2)] {
        entries.push(Entry::new(&shapes::equal("16 GiB", 8, 2 * GI / size), dtype, 0));
        // in 8, as PyTorch takes no more
    }

    // What people train, and what one process of many holds.
    each(&mut entries, &shapes::shard("Llama-3-8B 1/8", shapes::llama_8b(), 8), usual);
    each(&mut entries, &shapes::gpt2_xl(), usual);
    each(&mut entries, &shapes::equal("300 x 4 Ki", 300, 4 * KI), usual);
    each(&mut entries, &shapes::equal("300 x 1 Mi", 300, MI), usual);
    each(&mut entries, &shapes::lora(), &["f32"]);
    each(&mut entries, &shapes::resnet50(), usual);
    each(&mut entries, &shapes::vit_b16(), &["bf16"]);
    each(&mut entries, &shapes::mamba_130m(), &["bf16"]);
    entries.push(bytes("1 GiB", GI, "f16"));

    // What is awkward.
    entries.push(Entry::new(&Shapes { name: "GPT-2 off by one", ..shapes::gpt2() }, "bf16", 1));
    entries.push(Entry::new(&shapes::equal("1 GiB off by one", 1, GI / 2), "bf16", 1));
    entries.push(Entry::new(&shapes::equal("1 GiB off by one", 1, GI / 4), "f32", 1));
    entries.push(Entry::new(&shapes::equal("2^31 + 1 elements", 1, (1 << 31) + 1), "bf16", 0));

    // By size.
    for (name, size) in [("1 KiB", KI), ("16 KiB", 16 * KI), ("256 KiB", 256 * KI), ("4 MiB", 4 * MI)] {
        entries.extend(usual.iter().map(|dtype| bytes(name, size, dtype)));
    }
    for (name, size) in [("16 MiB", 16 * MI), ("64 MiB", 64 * MI), ("256 MiB", 256 * MI)] {
        entries.extend(usual.iter().map(|dtype| bytes(name, size, dtype)));
    }
    // By number of tensors; 300 and 3000 are above.
    for (name, count) in [
        ("1 x 4 Ki", 1),
        ("10 x 4 Ki", 10),
        ("30 x 4 Ki", 30),
        ("100 x 4 Ki", 100),
        ("1000 x 4 Ki", 1000),
        ("10000 x 4 Ki", 10_000),
        ("20000 x 4 Ki", 20_000),
    ] {
        each(&mut entries, &shapes::equal(name, count, 4 * KI), &all[..1]);
    }
    each(&mut entries, &shapes::llama_1b(), &["bf16"]);
    each(&mut entries, &shapes::equal("3000 x 1 Mi", 3000, MI), usual);
    each(&mut entries, &shapes::gpt2(), &all[2..]);
    each(&mut entries, &shapes::equal("3000 x 4 Ki", 3000, 4 * KI), &all[2..]);
    each(&mut entries, &moe, &all[2..]);
    each(&mut entries, &shapes::vit_b16(), &["f32"]);
    each(&mut entries, &shapes::mamba_130m(), &["f32"]);
    each(&mut entries, &shapes::lora(), &["bf16"]);

    // Takes twice this much memory, so a run of its own: `--max-gib 64`.
    entries.extend(usual.iter().map(|dtype| bytes(LARGEST, 64 * GI - ALIGN, dtype)));
    entries
}
