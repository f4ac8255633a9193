//! The CPU path over lists of real models, beside what anybody would write, what candle's users write (feature
//! `candle`), and what the machine's memory gives. `benches/README.md` says how to run it, and how a record is made.
//!
//!     cargo bench --bench cpu --features candle -- --quick
//!     cargo bench --bench cpu -- 'GPT-2/bf16/clip/gradclip'
//!
//! Throughput counts the bytes that have to move: a read of the gradients for a norm, a read and a write for a scale or
//! a clamp, both for a clip that clips.
#![allow(clippy::unwrap_used, missing_docs)]

mod support {
    pub mod cases;
    pub mod limits;
    pub mod record;
    pub mod shapes;
}

use criterion::{Criterion, Throughput};
use gradclip::cpu::AsGradMut;
use half::{bf16, f16};
use support::cases::{cases, Float, List, Op, READ, UPDATE};
use support::record::Record;
use support::shapes::{self, Shapes};

/// Lists in f32 and bf16, as they are trained.
fn model_lists() -> Vec<Shapes> {
    vec![
        shapes::equal("300 x 4 Ki", 300, 4 << 10),
        shapes::equal("3000 x 4 Ki", 3000, 4 << 10),
        shapes::lora(),
        shapes::resnet50(),
        shapes::vit_b16(),
        shapes::gpt2(),
        shapes::mamba_130m(),
    ]
}

/// One tensor of 1 GiB, for every type: far beyond any cache.
fn gibibyte<T>() -> Shapes {
    shapes::equal("1 GiB", 1, (1 << 30) / size_of::<T>())
}

/// What each list is given to: criterion, or the record.
trait Visitor {
    fn visit<T: Float>(&mut self, shapes: &Shapes)
    where
        Vec<T>: AsGradMut;
}

impl Visitor for Criterion {
    fn visit<T: Float>(&mut self, shapes: &Shapes)
    where
        Vec<T>: AsGradMut,
    {
        let mut list = List::<T>::new(shapes);
        let bytes = (shapes.total() * size_of::<T>()) as u64;
        for op in Op::ALL {
            list.fill();
            let mut group = self.benchmark_group(format!("{}/{}/{}", shapes.name, T::NAME, op.name()));
            group.sample_size(10);
            for case in cases::<T>(op) {
                let passes = match case.implementation {
                    READ => 1,
                    UPDATE | "plain copy" => 2,
                    _ => op.traffic() as u64,
                };
                group.throughput(Throughput::Bytes(passes * bytes));
                group.bench_function(case.implementation, |bencher| bencher.iter(|| (case.run)(&mut list)));
            }
            group.finish();
        }
    }
}

impl<W: std::io::Write> Visitor for Record<W> {
    fn visit<T: Float>(&mut self, shapes: &Shapes)
    where
        Vec<T>: AsGradMut,
    {
        self.list::<T>(shapes).unwrap();
    }
}

fn visit_all(visitor: &mut impl Visitor) {
    for shapes in model_lists() {
        visitor.visit::<f32>(&shapes);
        visitor.visit::<bf16>(&shapes);
    }
    visitor.visit::<f32>(&gibibyte::<f32>());
    visitor.visit::<f64>(&gibibyte::<f64>());
    visitor.visit::<f16>(&gibibyte::<f16>());
    visitor.visit::<bf16>(&gibibyte::<bf16>());
    if std::env::var_os("GRADCLIP_BENCH_LARGE").is_some() {
        visitor.visit::<bf16>(&shapes::llama_1b());
    }
}

/// Each once, on little: what `cargo test --benches` does.
fn visit_tiny(visitor: &mut impl Visitor) {
    let shapes = Shapes { name: "tiny", numels: vec![1000, 1, 0, 70_000] };
    visitor.visit::<f32>(&shapes);
    visitor.visit::<f64>(&shapes);
    visitor.visit::<f16>(&shapes);
    visitor.visit::<bf16>(&shapes);
}

fn main() {
    shapes::check();
    let has = |wanted: &str| std::env::args().any(|arg| arg == wanted);
    let test = has("--test") || !has("--bench");
    let mut criterion = Criterion::default().configure_from_args();
    if test {
        visit_tiny(&mut Record::new(std::io::sink()).unwrap());
        visit_tiny(&mut criterion);
    } else if let Some(path) = std::env::var_os("GRADCLIP_RECORD") {
        visit_all(&mut Record::new(std::fs::File::create(path).unwrap()).unwrap());
    } else {
        visit_all(&mut criterion);
        criterion.final_summary();
    }
}
