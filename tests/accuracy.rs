//! The error of the norm against exact arithmetic: within what the order of the additions allows, for any data, and
//! within what is promised, for normally distributed data.
//!
//! The long run takes minutes and 1 GB: `cargo test --release --test accuracy -- --ignored --nocapture`.
#![allow(clippy::unwrap_used)]

#[path = "support/exact.rs"]
mod exact;
#[path = "support/format.rs"]
mod format;
#[path = "support/tensor.rs"]
mod tensor;
#[path = "support/tolerance.rs"]
mod tolerance;

use format::{power_of_two, Float, Format};
use gradclip::cpu::{self, AsGrad};
use gradclip::{Dtype, NormType};
use half::{bf16, f16};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rayon::prelude::*;
use std::f64::consts::TAU;

const SUMS: [NormType; 2] = [NormType::L1, NormType::L2];

/// Around one element, a pack, a warp, a row, a segment and a tile of each type, and over several tiles.
const LENGTHS: [usize; 17] = [1, 2, 3, 7, 31, 32, 33, 127, 128, 129, 1000, 4096, 8191, 8192, 8193, 16385, 100_000];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Data {
    Normal,
    /// Over 12 decades.
    LogNormal,
    Uniform,
    /// 0.1, which no format has: every square and every addition is rounded, all alike.
    Constant,
    PowersOfTwo,
    /// 1, 1/2, 1/3, ...
    Decreasing,
    /// One element that dwarfs each of the others, which together count.
    OneHuge,
    /// A large and a small element in turn.
    Alternating,
    /// One 1 at the front of many terms of just under half its last bit: added in order in the accumulator's own
    /// precision they would all be lost.
    Absorbed,
    /// The same for every chain: it meets a 1 in its first row and then only terms that are rounded away. The worst
    /// that this order of additions can be given.
    AbsorbedInEveryChain,
}

const ALL_DATA: [Data; 10] = [
    Data::Normal,
    Data::LogNormal,
    Data::Uniform,
    Data::Constant,
    Data::PowersOfTwo,
    Data::Decreasing,
    Data::OneHuge,
    Data::Alternating,
    Data::Absorbed,
    Data::AbsorbedInEveryChain,
];

impl Data {
    /// Elements `start..` of the data. `norm_type` matters where terms, not elements, are what is chosen.
    fn fill<T: Sample>(self, norm_type: NormType, seed: u64, start: usize, elements: &mut [T]) {
        let mut rng = SmallRng::seed_from_u64(seed ^ (start as u64) << 20);
        let absorbed = T::absorbed(norm_type);
        // Chains of a segment: 512 bytes hold one element of each.
        let chains = 512 / size_of::<T>();
        for (i, element) in (start..).zip(elements) {
            let x = match self {
                Self::Normal => normal(&mut rng),
                // f16 has 5 decades below 65504 and 4 above its smallest normal.
                Self::LogNormal if T::DTYPE == Dtype::F16 => (3.0 * normal(&mut rng) - 3.0).exp().min(65504.0),
                Self::LogNormal => (3.0 * normal(&mut rng)).exp(),
                Self::Uniform => rng.random_range(-1.0..1.0),
                Self::Constant => 0.1,
                Self::PowersOfTwo => power_of_two(rng.random_range(-12..12)),
                Self::Decreasing => 1.0 / (i + 1) as f64,
                Self::OneHuge if i == 0 => 60000.0,
                Self::OneHuge => rng.random_range(0.5..1.0),
                Self::Alternating => [1e4, 1e-3][i % 2] * rng.random_range(0.5..1.0),
                Self::Absorbed if i == 0 => 1.0,
                Self::AbsorbedInEveryChain if i % (8 * chains) < chains => 1.0,
                Self::Absorbed | Self::AbsorbedInEveryChain => absorbed,
            };
            *element = T::sample(x);
        }
    }

    fn of_length<T: Sample>(self, norm_type: NormType, seed: u64, length: usize) -> Vec<T> {
        const CHUNK: usize = 1 << 16;
        let mut elements = vec![T::sample(0.0); length];
        let chunks = elements.par_chunks_mut(CHUNK).enumerate();
        chunks.for_each(|(i, chunk)| self.fill(norm_type, seed, i * CHUNK, chunk));
        elements
    }
}

/// Box and Muller.
fn normal(rng: &mut SmallRng) -> f64 {
    (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt() * (TAU * rng.random::<f64>()).cos()
}

/// A type that data can be made of. How it rounds does not matter here, only that it is fast.
trait Sample: Float {
    fn sample(x: f64) -> Self;

    /// An element whose term is just under half the last bit of 1 in the accumulator: f64 for f64, else f32.
    fn absorbed(norm_type: NormType) -> f64 {
        let half_a_bit = power_of_two(if Self::DTYPE == Dtype::F64 { -53 } else { -24 });
        match norm_type {
            NormType::L2 => 0.97 * half_a_bit.sqrt(),
            // The smallest f16 is exactly half the last bit, and goes to the even 1.
            _ if Self::DTYPE == Dtype::F16 => half_a_bit,
            _ => 0.97 * half_a_bit,
        }
    }
}
impl Sample for f32 {
    fn sample(x: f64) -> Self {
        x as f32
    }
}
impl Sample for f64 {
    fn sample(x: f64) -> Self {
        x
    }
}
impl Sample for f16 {
    fn sample(x: f64) -> Self {
        Self::from_f32(x as f32)
    }
}
impl Sample for bf16 {
    fn sample(x: f64) -> Self {
        Self::from_f32(x as f32)
    }
}

/// Measures one vector, and asserts the bounds. Returns the relative error.
fn error_of<T: Sample>(data: Data, norm_type: NormType, elements: &Vec<T>) -> f64
where
    Vec<T>: AsGrad,
{
    let (length, exact) = (elements.len(), exact::norm(elements, norm_type));
    let got = cpu::total_norm(std::slice::from_ref(elements), norm_type).unwrap().total_norm;
    let error = tolerance::relative_error(got, exact);
    let bound = tolerance::norm_of(T::DTYPE, length, norm_type);
    let what = format!("{norm_type:?} of {length} {data:?} {}: {got:e}, exact {exact:e}", T::DTYPE);
    assert!(error <= bound, "{what}: off by {error:.2e}, bound {bound:.2e}");
    if data == Data::Normal {
        let promised = tolerance::promised_on_normal_data(T::DTYPE);
        assert!(error <= promised, "{what}: off by {error:.2e}, promised {promised:.0e}");
    }
    error
}

fn all_lengths<T: Sample>()
where
    Vec<T>: AsGrad,
{
    for data in ALL_DATA {
        for norm_type in SUMS {
            for length in LENGTHS {
                error_of(data, norm_type, &data.of_length::<T>(norm_type, 1, length));
            }
        }
    }
    for norm_type in SUMS {
        error_of(Data::Normal, norm_type, &Data::Normal.of_length::<T>(norm_type, 2, 1_000_000));
    }
}

#[test]
fn f32_of_any_length() {
    all_lengths::<f32>();
}

#[test]
fn f64_of_any_length() {
    all_lengths::<f64>();
}

#[test]
fn f16_of_any_length() {
    all_lengths::<f16>();
}

#[test]
fn bf16_of_any_length() {
    all_lengths::<bf16>();
}

/// The worst error of each order, in its bound and printed: `cargo test --test accuracy -- --nocapture of_any_order`.
fn any_order<T: Sample>()
where
    Vec<T>: AsGrad,
{
    let data = [Data::Normal, Data::LogNormal, Data::Uniform, Data::Constant, Data::Decreasing, Data::OneHuge];
    for p in [0.01, 0.5, 1.5, 3.0, 4.0, 10.7, 100.0] {
        let (mut worst, mut of_bound, mut normal) = (0.0f64, 0.0f64, 0.0f64);
        for data in data {
            for length in [1, 2, 3, 33, 128, 1000, 2049, 16385] {
                let elements = data.of_length::<T>(NormType::L2, 1, length);
                let error = error_of(data, NormType::P(p), &elements);
                if length == 1 {
                    assert_eq!(error, 0.0, "one element has a norm without rounding");
                }
                worst = worst.max(error);
                of_bound = of_bound.max(error / tolerance::norm_of(T::DTYPE, length, NormType::P(p)));
                normal = normal.max(if data == Data::Normal { error } else { 0.0 });
            }
        }
        println!("| {} | {p} | {normal:.1e} | {worst:.1e} | {:.0} % of its bound |", T::DTYPE, 100.0 * of_bound);
    }
}

#[test]
fn f32_and_f64_of_any_order() {
    any_order::<f32>();
    any_order::<f64>();
}

#[test]
fn f16_and_bf16_of_any_order() {
    any_order::<f16>();
    any_order::<bf16>();
}

/// From the smallest subnormal to the largest number: whatever the power, nothing of it is lost.
#[test]
fn any_order_of_every_exponent() {
    let mut rng = SmallRng::seed_from_u64(6);
    let mantissas: Vec<f64> = (0..40).map(|_| rng.random_range(1.0..2.0)).collect();
    for exponent in -1074..1023 {
        let elements: Vec<f64> = mantissas.iter().map(|x| x * power_of_two(exponent)).collect();
        for p in [0.5, 3.0, 100.0] {
            let (norm_type, list) = (NormType::P(p), std::slice::from_ref(&elements));
            let (got, exact) =
                (cpu::total_norm(list, norm_type).unwrap().total_norm, exact::norm(&elements, norm_type));
            let bound = tolerance::norm_of(Dtype::F64, elements.len(), norm_type);
            assert!(tolerance::close(got, exact, bound), "2^{exponent}, p = {p}: {got:e}, exact {exact:e}");
        }
    }
}

/// More tiles than there are threads that fold them, so that some fold two.
#[test]
fn more_than_one_row_of_tiles() {
    let length = (gradclip::abi::FOLD_THREADS + 3) * gradclip::abi::TILE_BYTES / 8 + 5;
    for norm_type in SUMS {
        error_of(Data::Uniform, norm_type, &Data::Uniform.of_length::<f64>(norm_type, 4, length));
    }
}

/// Every exponent a type has: across the borders where sums change their range, and where partial sums that are in range
/// add up to one that is not. Of elements that all differ, and of equal ones, whose squares all lose the same where they
/// are subnormal. Two tiles and a bit.
fn every_exponent<T: Sample>()
where
    Vec<T>: AsGrad,
{
    let length = 2 * gradclip::abi::TILE_BYTES / size_of::<T>() + 100;
    let mut rng = SmallRng::seed_from_u64(5);
    let different: Vec<f64> = (0..length).map(|_| rng.random_range(1.0..2.0)).collect();
    let Format { precision, min_unit, .. } = T::FORMAT;
    let binades = (T::FORMAT.inf_bits() >> (precision - 1)) as i32 - 1; // the normal ones
    let largest = min_unit + (precision as i32 - 1) + (binades - 1);
    for exponent in min_unit..largest {
        let factor = power_of_two(exponent);
        let equal = vec![different[exponent.unsigned_abs() as usize]; length];
        for mantissas in [&different, &equal] {
            let elements: Vec<T> = mantissas.iter().map(|x| T::sample(x * factor)).collect();
            for norm_type in SUMS {
                let exact = exact::norm(&elements, norm_type);
                let got = cpu::total_norm(std::slice::from_ref(&elements), norm_type).unwrap().total_norm;
                let bound = tolerance::norm_of(T::DTYPE, length, norm_type);
                let what = format!("{norm_type:?} of {} around 2^{exponent}", T::DTYPE);
                assert!(tolerance::close(got, exact, bound), "{what}: {got:e}, exact {exact:e}");
            }
        }
    }
}

#[test]
fn f32_of_every_exponent() {
    every_exponent::<f32>();
}

#[test]
fn f64_of_every_exponent() {
    every_exponent::<f64>();
}

#[test]
fn f16_and_bf16_of_every_exponent() {
    every_exponent::<f16>();
    every_exponent::<bf16>();
}

/// Many short lists of normal data: with few elements the errors of single additions show, and do not average out.
fn short_normal<T: Sample>(lists: u64)
where
    Vec<T>: AsGrad,
{
    let worst = |norm_type: NormType| {
        let error = |seed: u64| {
            let length = 1 + seed as usize % 300;
            error_of(Data::Normal, norm_type, &Data::Normal.of_length::<T>(norm_type, seed + 100, length))
        };
        (0..lists).into_par_iter().map(error).reduce(|| 0.0, f64::max)
    };
    println!("{lists} short {}: L1 {:.1e}, L2 {:.1e}", T::DTYPE, worst(NormType::L1), worst(NormType::L2));
}

#[test]
fn short_tensors() {
    short_normal::<f32>(1200);
    short_normal::<f64>(1200);
    short_normal::<f16>(1200);
    short_normal::<bf16>(1200);
}

#[test]
#[ignore = "minutes; run in release"]
fn hundreds_of_thousands_of_short_tensors() {
    short_normal::<f32>(300_000);
    short_normal::<f64>(300_000);
    short_normal::<f16>(300_000);
    short_normal::<bf16>(300_000);
}

/// The data that has no worse is a test only if it comes close to the bound: within a factor of 3 of it, in the types
/// whose chains are plain f32.
#[test]
fn the_worst_data_is_near_the_bound() {
    fn ratio<T: Sample>(norm_type: NormType) -> f64
    where
        Vec<T>: AsGrad,
    {
        let length = 1 << 16;
        let data = Data::AbsorbedInEveryChain;
        let error = error_of(data, norm_type, &data.of_length::<T>(norm_type, 1, length));
        error / tolerance::norm_of(T::DTYPE, length, norm_type)
    }
    for norm_type in SUMS {
        assert!(ratio::<f16>(norm_type) > 1.0 / 3.0, "{norm_type:?} f16: {}", ratio::<f16>(norm_type));
        assert!(ratio::<bf16>(norm_type) > 1.0 / 3.0, "{norm_type:?} bf16: {}", ratio::<bf16>(norm_type));
    }
}

/// One line of the table of the long run.
fn long<T: Sample>(length: usize)
where
    Vec<T>: AsGrad,
{
    for data in ALL_DATA {
        let errors = SUMS.map(|norm_type| {
            let elements = data.of_length::<T>(norm_type, 3, length);
            (error_of(data, norm_type, &elements), tolerance::norm_of(T::DTYPE, length, norm_type))
        });
        let [(l1, l1_bound), (l2, l2_bound)] = errors;
        let data = format!("{data:?}");
        println!("| {} | {data:20} | {l1:.1e} | {l1_bound:.1e} | {l2:.1e} | {l2_bound:.1e} |", T::DTYPE);
    }
}

#[test]
#[ignore = "minutes, and 1 GB; run in release"]
fn long_tensors() {
    let length = 120_000_007;
    println!("relative error of the norm of {length} elements, and its bound");
    println!("| dtype | data | L1 | bound | L2 | bound |");
    long::<f32>(length);
    long::<f64>(length);
    long::<f16>(length);
    long::<bf16>(length);
}
