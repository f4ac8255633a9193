//! Lists of gradients to draw from: all dtypes, lengths around the borders of the layout, extreme values.
#![allow(dead_code)] // every test binary uses a part

use super::format::{nearest, Format, DTYPES};
use super::tensor::Tensor;
use gradclip::Dtype;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// A tensor by what it is made from: short to print, and to shrink.
#[derive(Clone, Debug)]
pub struct Spec {
    pub dtype: Dtype,
    pub numel: usize,
    pub content: Content,
    pub seed: u64,
}

#[derive(Clone, Copy, Debug)]
pub enum Content {
    Zeros,
    /// Between -8 and 8, none closer to 0 than 1/8.
    Moderate,
    /// Any finite pattern: all exponents.
    AnyFinite,
    /// Around the smallest normal number.
    Tiny,
    /// Near the largest.
    Huge,
    /// Moderate, with NaN and Inf among them: one at least.
    Special,
}

impl Spec {
    pub fn tensor(&self) -> Tensor {
        let format = Format::of(self.dtype);
        let mut rng = SmallRng::seed_from_u64(self.seed);
        let hidden = 1u64 << (format.precision - 1);
        let special = rng.random_range(0..self.numel.max(1));
        let bits = (0..self.numel).map(|i| {
            let sign = if rng.random() { format.sign_bit() } else { 0 };
            let moderate = nearest(self.dtype, rng.random_range(0.125..8.0));
            sign | match self.content {
                Content::Zeros => 0,
                Content::Moderate => moderate,
                Content::AnyFinite => rng.random_range(0..format.inf_bits()),
                Content::Tiny => rng.random_range(0..4 * hidden),
                Content::Huge => rng.random_range(format.inf_bits() - 2 * hidden..format.inf_bits()),
                Content::Special if i != special && rng.random_range(0..40) > 0 => moderate,
                Content::Special if rng.random() => format.inf_bits(),
                Content::Special => format.inf_bits() + rng.random_range(1..hidden),
            }
        });
        Tensor::from_bits(self.dtype, bits)
    }
}

/// Lengths around a pack, a row, a segment and a tile, and empty.
fn numel() -> impl Strategy<Value = usize> {
    prop_oneof![
        1 => Just(0usize),
        6 => 1..10usize,
        6 => 1..300usize,
        3 => 500..2100usize,
        1 => 4000..20_000usize,
    ]
}

pub fn spec(dtypes: &'static [Dtype], contents: &'static [Content]) -> impl Strategy<Value = Spec> {
    (select(dtypes), numel(), select(contents), any::<u64>()).prop_map(|(dtype, numel, content, seed)| Spec {
        dtype,
        numel,
        content,
        seed,
    })
}

pub const FINITE: &[Content] =
    &[Content::Zeros, Content::Moderate, Content::Moderate, Content::AnyFinite, Content::Tiny, Content::Huge];

/// Lists of finite elements: of one kind of content, or of all mixed.
pub fn finite_lists() -> impl Strategy<Value = Vec<Spec>> {
    prop_oneof![
        vec(spec(&DTYPES, FINITE), 0..7),
        vec(spec(&DTYPES, &[Content::Moderate]), 1..7),
        vec(spec(&DTYPES, &[Content::Tiny, Content::Zeros]), 1..4),
        vec(spec(&[Dtype::F64], &[Content::AnyFinite]), 1..4),
    ]
}

/// Lists with a bad element, or with f64 whose norm is beyond f64.
pub fn nonfinite_lists() -> impl Strategy<Value = Vec<Spec>> {
    let any = || vec(spec(&DTYPES, &[Content::Special, Content::Moderate, Content::Huge, Content::Zeros]), 0..4);
    let bad = prop_oneof![3 => spec(&DTYPES, &[Content::Special]).boxed(), 1 => spec(&[Dtype::F64], &[Content::Huge]).boxed()];
    (any(), bad, any()).prop_map(|(before, bad, after)| [before, vec![bad], after].concat())
}

pub fn tensors(specs: &[Spec]) -> Vec<Tensor> {
    specs.iter().map(Spec::tensor).collect()
}
