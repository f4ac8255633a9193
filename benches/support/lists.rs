//! What is measured on the CPU: lists of gradients, each in the types in which it is trained.

use super::shapes::{self, Shapes};
use serde::Serialize;

const KI: usize = 1 << 10;
const MI: usize = 1 << 20;
const GI: usize = 1 << 30;

/// A list of gradients of one type.
#[derive(Serialize)]
pub struct Entry {
    pub list: &'static str,
    pub dtype: &'static str,
    pub numels: Vec<usize>,
}

impl Entry {
    fn new(shapes: &Shapes, dtype: &'static str) -> Self {
        Self { list: shapes.name, dtype, numels: shapes.numels.clone() }
    }

    pub fn shapes(&self) -> Shapes {
        Shapes { name: self.list, numels: self.numels.clone() }
    }
}

/// One tensor of that many bytes.
fn bytes(name: &'static str, bytes: usize, dtype: &'static str) -> Entry {
    let size = match dtype {
        "f64" => 8,
        "f32" => 4,
        _ => 2,
    };
    Entry::new(&shapes::equal(name, 1, bytes / size), dtype)
}

const USUAL: [&str; 2] = ["f32", "bf16"];

fn each(shapes: &Shapes) -> impl Iterator<Item = Entry> + '_ {
    USUAL.into_iter().map(|dtype| Entry::new(shapes, dtype))
}

/// What the README shows, the most important first: a budget that runs out leaves out the end.
pub fn first() -> Vec<Entry> {
    let mut entries: Vec<Entry> = USUAL.map(|dtype| bytes("1 GiB", GI, dtype)).into();
    let short = [shapes::equal("3000 x 4 Ki", 3000, 4 * KI), shapes::equal("300 x 4 Ki", 300, 4 * KI)];
    entries.extend([shapes::gpt2(), shapes::resnet50()].iter().chain(&short).flat_map(each));
    entries
}

/// Other types, and other models.
pub fn others() -> Vec<Entry> {
    let mut entries: Vec<Entry> = ["f16", "f64"].map(|dtype| bytes("1 GiB", GI, dtype)).into();
    entries.extend([shapes::lora(), shapes::vit_b16(), shapes::mamba_130m()].iter().flat_map(each));
    entries
}

/// The largest models that leave room for PyTorch's copies, in the type in which they are trained.
pub fn larger() -> Vec<Entry> {
    let moe = shapes::shard("Qwen3-30B-A3B 1/32", shapes::qwen3_30b(), 32);
    let llama_8b = shapes::shard("Llama-3-8B 1/8", shapes::llama_8b(), 8);
    let mut entries = vec![Entry::new(&moe, "bf16"), Entry::new(&shapes::equal("300 x 1 Mi", 300, MI), "f32")];
    entries.extend([llama_8b, shapes::gpt2_xl(), shapes::llama_1b()].iter().map(|model| Entry::new(model, "bf16")));
    entries
}

/// One tensor of any size, and any number of small ones: what the pictures show. Beside these, `first` has 1 GiB, and 300
/// and 3000 tensors.
pub fn sweeps() -> Vec<Entry> {
    let mut entries = Vec::new();
    for (name, size) in [
        ("1 KiB", KI),
        ("4 KiB", 4 * KI),
        ("16 KiB", 16 * KI),
        ("64 KiB", 64 * KI),
        ("256 KiB", 256 * KI),
        ("1 MiB", MI),
        ("4 MiB", 4 * MI),
        ("16 MiB", 16 * MI),
        ("64 MiB", 64 * MI),
        ("256 MiB", 256 * MI),
    ] {
        entries.extend(USUAL.map(|dtype| bytes(name, size, dtype)));
    }
    for (name, count) in [
        ("1 x 4 Ki", 1),
        ("10 x 4 Ki", 10),
        ("30 x 4 Ki", 30),
        ("100 x 4 Ki", 100),
        ("1000 x 4 Ki", 1000),
        ("10000 x 4 Ki", 10_000),
        ("20000 x 4 Ki", 20_000),
    ] {
        entries.push(Entry::new(&shapes::equal(name, count, 4 * KI), "f32"));
    }
    entries
}
