//! The CPU path over lists of real models, beside a naive loop, candle's own operations (feature `candle`), and what the
//! machine's memory gives: a plain read and a plain copy of the same bytes.
//!
//!     cargo bench --bench cpu -- --quick
//!
//! Throughput counts the bytes that have to move: one read of the gradients for a norm, one read and one write for a
//! scale or a clamp, both for a clip that clips. Compare within one run only.
#![allow(clippy::unwrap_used, missing_docs)]

mod support {
    pub mod shapes;
}

use criterion::{criterion_group, criterion_main, Criterion, Throughput};
use gradclip::cpu::{self, AsGradMut};
use gradclip::{ClipNorm, NormType};
use half::bf16;
use rayon::prelude::*;
use std::hint::black_box;
use support::shapes::{self, Shapes};

/// Reproducible values of both signs, spread like gradients are: a sum of four uniform numbers.
fn value(index: usize) -> f32 {
    let mut state = index as u64 ^ 0x9e37_79b9_7f4a_7c15;
    let sum: u32 = (0..4)
        .map(|_| {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            (state >> 40) as u32
        })
        .sum();
    (sum as f32 / (1u32 << 25) as f32 - 1.0) * 1e-2
}

fn gradients<T: Send>(shapes: &Shapes, convert: impl Fn(f32) -> T + Sync) -> Vec<Vec<T>> {
    shapes.numels.iter().map(|&numel| (0..numel).into_par_iter().map(|i| convert(value(i))).collect()).collect()
}

/// What a first attempt would be: one core, f32 all through.
fn naive_norm(grads: &[Vec<f32>]) -> f32 {
    grads.iter().flatten().map(|x| x * x).sum::<f32>().sqrt()
}

fn naive_scale(grads: &mut [Vec<f32>], coef: f32) {
    grads.iter_mut().flatten().for_each(|x| *x *= coef);
}

/// All cores, one pass: as fast as memory can be read.
fn plain_read(grads: &[Vec<f32>]) -> u64 {
    let words = |slice: &[f32]| slice.iter().fold(0u32, |all, x| all | x.to_bits());
    grads
        .par_iter()
        .map(|grad| grad.par_chunks(1 << 17).map(words).reduce(|| 0, |a, b| a | b))
        .reduce(|| 0, |a, b| a | b)
        .into()
}

fn plain_copy(from: &[Vec<f32>], to: &mut [Vec<f32>]) {
    from.par_iter().zip(to).for_each(|(from, to)| {
        from.par_chunks(1 << 17).zip(to.par_chunks_mut(1 << 17)).for_each(|(from, to)| to.copy_from_slice(from));
    });
}

/// The norm in f64, one element after the other.
fn oracle(grads: &[Vec<f32>]) -> f64 {
    grads.iter().flatten().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt()
}

fn bench_list(c: &mut Criterion, shapes: &Shapes) {
    let mut grads = gradients(shapes, |x| x);
    let mut halves = gradients(shapes, bf16::from_f32);
    let bytes = 4 * shapes.numels.iter().sum::<usize>() as u64;
    let norm = oracle(&grads);
    // Answers are checked before they are timed.
    let report = cpu::total_norm(&grads, NormType::L2).unwrap();
    assert!((report.total_norm / norm - 1.0).abs() < 1e-9, "{} is not {norm}", report.total_norm);
    let nearly_one = 1.0 - 2f64.powi(-20);

    let mut group = c.benchmark_group(format!("{}: norm", shapes.name));
    group.sample_size(10).throughput(Throughput::Bytes(bytes));
    group.bench_function("limit: plain read", |b| b.iter(|| plain_read(black_box(&grads))));
    group.bench_function("gradclip f32 L2", |b| b.iter(|| cpu::total_norm(black_box(&grads), NormType::L2).unwrap()));
    group.bench_function("gradclip f32 Inf", |b| b.iter(|| cpu::total_norm(black_box(&grads), NormType::Inf).unwrap()));
    group.bench_function("naive f32 L2", |b| b.iter(|| naive_norm(black_box(&grads))));
    #[cfg(feature = "candle")]
    candle_ops::bench_norm(&mut group, &grads, norm);
    group.throughput(Throughput::Bytes(bytes / 2));
    group.bench_function("gradclip bf16 L2", |b| b.iter(|| cpu::total_norm(black_box(&halves), NormType::L2).unwrap()));
    group.finish();

    let mut group = c.benchmark_group(format!("{}: clip", shapes.name));
    group.sample_size(10).throughput(Throughput::Bytes(bytes));
    group.bench_function("gradclip f32, within the threshold", |b| b.iter(|| clip(&mut grads, f64::MAX, false)));
    group.throughput(Throughput::Bytes(2 * bytes));
    let mut copy = grads.clone();
    group.bench_function("limit: plain copy", |b| b.iter(|| plain_copy(black_box(&grads), &mut copy)));
    drop(copy);
    group.bench_function("gradclip f32 by value, nothing outside", |b| {
        b.iter(|| assert_eq!(cpu::clip_grad_value(&mut grads, 1.0).unwrap().clipped, 0));
    });
    group.throughput(Throughput::Bytes(3 * bytes));
    let mut max_norm = norm;
    group.bench_function("gradclip f32", |b| {
        b.iter(|| {
            max_norm *= nearly_one; // so that every call clips, and by next to nothing
            clip(&mut grads, max_norm, true);
        });
    });
    group.bench_function("naive f32", |b| {
        b.iter(|| {
            black_box(naive_norm(&grads));
            naive_scale(&mut grads, nearly_one as f32);
        });
    });
    group.throughput(Throughput::Bytes(3 * bytes / 2));
    // bf16 would round the same coefficient away and the norm stay above the threshold: that clips in every call too.
    let threshold = nearly_one * cpu::total_norm(&halves, NormType::L2).unwrap().total_norm;
    group.bench_function("gradclip bf16", |b| b.iter(|| clip(&mut halves, threshold, true)));
    group.finish();
}

fn clip<G: AsGradMut>(grads: &mut [G], max_norm: f64, expect_written: bool) {
    let report = cpu::clip_grad_norm(grads, ClipNorm::new(max_norm)).unwrap();
    assert_eq!(report.written, expect_written);
}

#[cfg(feature = "candle")]
mod candle_ops {
    use candle_core::{Device, Tensor};
    use criterion::{measurement::WallTime, BenchmarkGroup};

    /// What candle's users write today: `sqr().sum_all()` of each tensor.
    pub fn bench_norm(group: &mut BenchmarkGroup<'_, WallTime>, grads: &[Vec<f32>], norm: f64) {
        let tensors: Vec<Tensor> =
            grads.iter().map(|grad| Tensor::new(grad.as_slice(), &Device::Cpu).unwrap()).collect();
        let total = || {
            let squares = |tensor: &Tensor| tensor.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
            tensors.iter().map(squares).sum::<f32>().sqrt()
        };
        assert!((f64::from(total()) / norm - 1.0).abs() < 0.1);
        group.bench_function("candle operations f32 L2", |b| b.iter(total));
    }
}

fn lists(c: &mut Criterion) {
    shapes::check();
    let tiny = std::env::args().any(|arg| arg == "--test"); // cargo test --benches: each once, on little
    if tiny {
        return bench_list(c, &shapes::equal("30 x 4 Ki", 30, 4096));
    }
    for list in [
        shapes::equal("300 x 4 Ki", 300, 4096),
        shapes::equal("3000 x 4 Ki", 3000, 4096),
        shapes::resnet50(),
        shapes::vit_b16(),
        shapes::gpt2_small(),
        shapes::equal("1 GiB in one tensor", 1, 1 << 28),
    ] {
        bench_list(c, &list);
    }
}

criterion_group!(benches, lists);
criterion_main!(benches);
