//! Plain clipping on the CPU, by calls that the crate has had from the start: scripts/before_after.py builds this against
//! two commits. For each line read from stdin it measures every case, and prints `case,microseconds`.

use gradclip::cpu;
use half::bf16;
use std::hint::black_box;
use std::io::{self, BufRead, Write};
use std::time::Instant;

const SAMPLES: usize = 9;

/// Microseconds of a call, the median of samples of so many calls each.
fn median(calls: u32, mut call: impl FnMut()) -> f64 {
    let mut sample = |_| {
        let start = Instant::now();
        (0..calls).for_each(|_| call());
        start.elapsed().as_secs_f64() * 1e6 / f64::from(calls)
    };
    let mut times: Vec<f64> = (0..SAMPLES).map(&mut sample).collect();
    times.sort_by(f64::total_cmp);
    times[SAMPLES / 2]
}

/// `count` gradients of `numel` elements, uniform in [-0.01, 0.01].
fn list<T>(count: usize, numel: usize, from: fn(f32) -> T) -> Vec<Vec<T>> {
    let mut state = 1u64;
    let mut random = || {
        state = state.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(1);
        from(((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 0.02)
    };
    (0..count).map(|_| (0..numel).map(|_| random()).collect()).collect()
}

macro_rules! measure {
    ($name:expr, $calls:expr, $list:expr) => {{
        let (name, calls, list) = ($name, $calls, &mut $list);
        let norm = median(calls, || {
            black_box(cpu::clip_grad_norm(list, 1e9).unwrap());
        });
        println!("{name}; clip by norm; within,{norm}");
        // Nothing is put back: each clip takes a thousandth off the norm.
        let mut max_norm = cpu::clip_grad_norm(list, 1e9).unwrap().total_norm;
        let clip = median(calls, || {
            max_norm *= 0.999;
            black_box(cpu::clip_grad_norm(list, max_norm).unwrap());
        });
        println!("{name}; clip by norm; scaled,{clip}");
        let value = median(calls, || {
            black_box(cpu::clip_grad_value(list, 1.0).unwrap());
        });
        println!("{name}; clip by value; nothing outside,{value}");
    }};
}

/// Lists from the memory, the third and the first level of the cache.
fn main() {
    let mut memory = (list(1, 1 << 26, |x| x), list(1, 1 << 27, bf16::from_f32));
    let mut third = (list(1, 1 << 20, |x| x), list(1, 1 << 21, bf16::from_f32));
    let mut many = (list(300, 4096, |x| x), list(300, 4096, bf16::from_f32));
    for _ in io::stdin().lock().lines() {
        measure!("256 MiB f32", 1, memory.0);
        measure!("256 MiB bf16", 1, memory.1);
        measure!("4 MiB f32", 5, third.0);
        measure!("4 MiB bf16", 5, third.1);
        measure!("300 x 4 Ki f32", 5, many.0);
        measure!("300 x 4 Ki bf16", 5, many.1);
        // Made anew: 900 clips a turn would leave nothing of it.
        measure!("1 KiB f32", 100, list(1, 256, |x| x));
        println!("done");
        io::stdout().flush().unwrap();
    }
}
