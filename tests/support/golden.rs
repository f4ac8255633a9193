//! The golden cases, and judging what a back end makes of them.
//!
//! Knows no back end: [`check`] takes a function from a [`Case`] to an [`Outcome`]. `tests/golden/README.md` has the
//! format and says what is right.
#![allow(dead_code, unused_imports)] // every test binary uses a part

#[path = "golden/read.rs"]
mod read;

pub use parts::Sharing;
pub use presets::Preset;

pub use read::{folder, read};

use super::format::{nearest, product, within_one_unit, Format};
use super::tensor::{bits_of, first_nonfinite, Tensor};
use super::tolerance;
use gradclip::{ClipNorm, ClipValue, Dtype, Error, NonFinite, NormReport, NormType, Scope, ScopedReport, ValueReport};
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// What to do, and to what.
#[derive(Clone, Debug)]
pub struct Case {
    pub name: String,
    pub op: Op,
    pub grads: Vec<Tensor>,
    /// Where the options come from, instead of `op`.
    pub preset: Option<Preset>,
    /// What has a norm of its own, where that is not the whole list.
    pub sharing: Option<Sharing>,
}

#[derive(Clone, Copy, Debug)]
pub enum Op {
    TotalNorm(NormType),
    /// `max_norm`, `norm_type` and `eps` are in here too, so that the judge can read them.
    ClipNorm {
        max_norm: f64,
        norm_type: NormType,
        eps: f64,
        loss_scale: f64,
        nonfinite: NonFinite,
    },
    ClipWithNorm {
        total_norm: f64,
        max_norm: f64,
        eps: f64,
        nonfinite: NonFinite,
    },
    ClipValue {
        lo: f64,
        hi: f64,
    },
}

/// What a back end did: its answer, and the gradients afterwards.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub answer: Result<Answer, Error>,
    pub grads: Vec<Tensor>,
}

#[derive(Clone, Debug)]
pub enum Answer {
    Norm(NormReport),
    Value(ValueReport),
    /// Of each tensor, group or row.
    Norms(ScopedReport),
}

impl Case {
    /// The options of `clip_grad_norm` or `clip_with_norm`: those of the preset, if there is one.
    pub fn clip_norm(&self) -> Option<ClipNorm> {
        let Some(preset) = &self.preset else { return self.plain_clip_norm() };
        preset.clip_norm().map(|clip| clip.loss_scale(self.loss_scale()))
    }

    /// The scope of `clip_grad_norm_by`, where not all gradients share one norm.
    pub fn scope(&self) -> Option<Scope<'_>> {
        self.sharing.as_ref().map(|sharing| match sharing {
            Sharing::Tensor => Scope::per_tensor(),
            Sharing::Group { of, max_norms } => Scope::groups(of).max_norms(max_norms),
            Sharing::Row(rows) => Scope::rows(rows),
        })
    }

    fn plain_clip_norm(&self) -> Option<ClipNorm> {
        match self.op {
            Op::ClipNorm { max_norm, norm_type, eps, loss_scale, nonfinite } => {
                let clip = ClipNorm::new(max_norm).norm_type(norm_type).loss_scale(loss_scale).nonfinite(nonfinite);
                Some(if eps == ClipNorm::TORCH_EPS { clip.torch_compatible() } else { clip.eps(eps) })
            }
            Op::ClipWithNorm { max_norm, eps, nonfinite, .. } => {
                Some(ClipNorm::new(max_norm).eps(eps).nonfinite(nonfinite))
            }
            _ => None,
        }
    }

    /// Of the gradients as they are, for `clip_with_norm`.
    pub fn given_norm(&self) -> Option<f64> {
        match self.op {
            Op::ClipWithNorm { total_norm, .. } => Some(total_norm),
            _ => None,
        }
    }

    fn loss_scale(&self) -> f64 {
        match self.op {
            Op::ClipNorm { loss_scale, .. } => loss_scale,
            _ => 1.0,
        }
    }

    /// What a report has to say.
    fn first_nonfinite(&self) -> Option<usize> {
        match self.op {
            Op::ClipWithNorm { .. } => None, // nobody looked
            _ => first_nonfinite(&self.grads),
        }
    }

    /// The options of `clip_grad_value`: those of the preset, if there is one.
    pub fn clip_value(&self) -> Option<ClipValue> {
        self.preset.as_ref().map_or_else(|| self.plain_clip_value(), Preset::clip_value)
    }

    /// From one value where the bounds are symmetric, as its callers have it.
    fn plain_clip_value(&self) -> Option<ClipValue> {
        match self.op {
            Op::ClipValue { lo, hi } if lo == -hi || hi.is_nan() => Some(ClipValue::new(hi)),
            Op::ClipValue { lo, hi } => Some(ClipValue::between(lo, hi)),
            _ => None,
        }
    }
}

/// A case with its answers.
#[derive(Clone, Debug)]
pub struct Golden {
    pub case: Case,
    pub peer: String,
    /// The true norm, rounded once; NaN or Inf where an element is, or where it is beyond f64.
    pub exact_norm: Option<f64>,
    pub exact_grads: Option<Vec<Tensor>>,
    /// Of each tensor, group or row.
    pub exact_norms: Option<Vec<f64>>,
    pub peer_norm: Option<f64>,
    pub peer_norms: Option<Vec<f64>>,
    pub peer_grads: Option<Vec<Tensor>>,
    pub peer_differs: Option<String>,
    pub peer_found_inf: Option<bool>,
}

/// How many cases were judged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub cases: BTreeMap<String, usize>,
    pub peer_differs: BTreeMap<String, usize>,
}

impl Counts {
    pub fn add(&mut self, golden: &Golden) {
        *self.cases.entry(golden.peer.clone()).or_default() += 1;
        *self.peer_differs.entry(golden.peer.clone()).or_default() += usize::from(golden.peer_differs.is_some());
    }
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (peer, cases) in &self.cases {
            let differs = self.peer_differs.get(peer).copied().unwrap_or(0);
            write!(f, "  {peer}: {cases} cases")?;
            writeln!(f, "{}", if differs > 0 { format!(", in {differs} of them it is wrong") } else { String::new() })?;
        }
        Ok(())
    }
}

/// Runs every case of a file, and judges it. Panics with all that is wrong.
pub fn check(file: &str, run: impl Fn(&Case) -> Outcome) -> Counts {
    let goldens = read(file);
    let wrong = wrong_cases(&goldens, run);
    assert!(wrong.is_empty(), "{} of the cases in {file} are wrong:\n{}", wrong.len(), first_lines(&wrong, 25));
    let mut counts = Counts::default();
    goldens.iter().for_each(|golden| counts.add(golden));
    println!("{file}\n{counts}");
    counts
}

/// What is wrong, a line for each case that is.
pub fn wrong_cases(goldens: &[Golden], run: impl Fn(&Case) -> Outcome) -> Vec<String> {
    let wrong = |golden: &Golden| judge(golden, &run).err().map(|what| format!("{}: {what}", golden.case.name));
    goldens.iter().filter_map(wrong).collect()
}

fn first_lines(lines: &[String], most: usize) -> String {
    let mut text = lines[..lines.len().min(most)].join("\n");
    if lines.len() > most {
        write!(text, "\n... and {} more", lines.len() - most).ok();
    }
    text
}

type Verdict = Result<(), String>;

/// `Err(message)` unless the condition holds.
macro_rules! require {
    ($condition:expr, $($message:tt)+) => {{
        let holds: bool = $condition;
        if !holds {
            return Err(format!($($message)+));
        }
    }};
}

// Here, as they use the macro.
#[path = "golden/parts.rs"]
mod parts;
#[path = "golden/presets.rs"]
mod presets;

fn judge(golden: &Golden, run: &impl Fn(&Case) -> Outcome) -> Verdict {
    let outcome = || run(&golden.case);
    if golden.case.preset.is_some() && matches!(golden.case.op, Op::ClipNorm { max_norm, .. } if max_norm >= 0.0) {
        return presets::judge(golden, &outcome());
    }
    if golden.case.preset.is_none() && golden.case.sharing.is_some() {
        return parts::judge(golden, &outcome());
    }
    match golden.case.op {
        Op::TotalNorm(_) => judge_total_norm(golden, &outcome()),
        Op::ClipNorm { max_norm, .. } if max_norm < 0.0 || max_norm.is_nan() => judge_refused(
            golden,
            &outcome(),
            |error| matches!(error, Error::InvalidThreshold { name: "max_norm", got, .. } if same(*got, max_norm)),
        ),
        Op::ClipNorm { max_norm, .. } | Op::ClipWithNorm { max_norm, .. } => match golden.exact_norm {
            Some(norm) if !norm.is_finite() => judge_policies(golden, norm, max_norm, run),
            _ => judge_clip_norm(golden, &outcome()),
        },
        Op::ClipValue { lo, hi } if lo <= hi => judge_clip_value(golden, &outcome()),
        Op::ClipValue { lo, hi } => judge_refused(golden, &outcome(), |error| match *error {
            Error::InvalidThreshold { name: "clip_value", got, .. } => lo == -hi || same(got, hi),
            Error::InvalidBounds { lo: got_lo, hi: got_hi } => same(got_lo, lo) && same(got_hi, hi),
            _ => false,
        }),
    }
}

/// Equal, or both NaN.
fn same(a: f64, b: f64) -> bool {
    a == b || (a.is_nan() && b.is_nan())
}

fn untouched(golden: &Golden, outcome: &Outcome) -> Verdict {
    require!(bits_of(&outcome.grads) == bits_of(&golden.case.grads), "gradients were touched");
    Ok(())
}

/// A call that has to fail, and to leave the gradients alone.
fn judge_refused(golden: &Golden, outcome: &Outcome, expected: impl Fn(&Error) -> bool) -> Verdict {
    match &outcome.answer {
        Err(error) => require!(expected(error), "the error is {error:?}"),
        Ok(answer) => return Err(format!("is no error, but {answer:?}")),
    }
    untouched(golden, outcome)
}

fn norm_report(outcome: &Outcome) -> Result<NormReport, String> {
    match &outcome.answer {
        Ok(Answer::Norm(report)) => Ok(*report),
        other => Err(format!("answered {other:?}")),
    }
}

/// The norm against the truth, and against a peer that is right.
fn judge_norm(golden: &Golden, norm_type: NormType, got: f64) -> Verdict {
    let exact = golden.exact_norm.ok_or("the file has no norm")?;
    // The loss scale is divided by on both sides: a rounding each.
    let relative = tolerance::norm(&golden.case.grads, norm_type) + Format::of(Dtype::F64).epsilon();
    let error = tolerance::relative_error(got, exact);
    require!(tolerance::close(got, exact, relative), "norm {got:e}, exact {exact:e}, off by {error:.2e} relative");
    if let (Some(peer), None) = (golden.peer_norm, &golden.peer_differs) {
        let allowed = tolerance::peer_norm(&golden.case.grads, exact) + relative * exact;
        require!(same(peer, got) || (peer - got).abs() <= allowed, "norm {got:e}, {} has {peer:e}", golden.peer);
    }
    Ok(())
}

fn judge_total_norm(golden: &Golden, outcome: &Outcome) -> Verdict {
    let Op::TotalNorm(norm_type) = golden.case.op else { return Err("no total_norm".into()) };
    let report = norm_report(outcome)?;
    judge_norm(golden, norm_type, report.total_norm)?;
    require!(!report.written && report.clip_coef == 1.0, "{report:?}");
    let first = first_nonfinite(&golden.case.grads);
    require!(report.first_nonfinite == first, "first bad tensor {:?}, not {first:?}", report.first_nonfinite);
    untouched(golden, outcome)
}

/// Clipping by a finite norm.
fn judge_clip_norm(golden: &Golden, outcome: &Outcome) -> Verdict {
    let report = norm_report(outcome)?;
    let (max_norm, eps, norm_error) = match golden.case.op {
        Op::ClipNorm { max_norm, norm_type, eps, .. } => {
            judge_norm(golden, norm_type, report.total_norm)?;
            (max_norm, eps, tolerance::norm(&golden.case.grads, norm_type))
        }
        Op::ClipWithNorm { total_norm, max_norm, eps, .. } => {
            require!(report.total_norm == total_norm, "norm {:e}, not {total_norm:e}", report.total_norm);
            (max_norm, eps, 0.0)
        }
        _ => return Err("no clipping by norm".into()),
    };
    require!(report.first_nonfinite.is_none(), "no tensor is bad, not {:?}", report.first_nonfinite);
    require!(report.written == (report.multiplier != 1.0), "{report:?}");
    require!(!report.found_inf && golden.peer_found_inf != Some(true), "{report:?}");
    let loss_scale = golden.case.loss_scale();
    require!(report.multiplier == report.clip_coef / loss_scale, "{report:?}");

    // The coefficient: the formula, applied to the norm that was found, and close to that of the true norm.
    let exact = golden.exact_norm.ok_or("the file has no norm")?;
    let formula = |norm: f64| if norm + eps > max_norm { max_norm / (norm + eps) } else { 1.0 };
    let (of_found, of_exact) = (formula(report.total_norm), formula(exact));
    require!(report.clip_coef == of_found, "coefficient {:e}, the formula gives {of_found:e}", report.clip_coef);
    let relative = norm_error + 6.0 * Format::of(Dtype::F64).epsilon();
    require!(
        tolerance::close(report.clip_coef, of_exact, relative),
        "coefficient {:e}, exact {of_exact:e}",
        report.clip_coef
    );
    if eps == ClipNorm::TORCH_EPS {
        let torch = f64::min(max_norm / (exact + 1e-6), 1.0);
        let unit = Format::of(Dtype::F32).unit(torch);
        require!(
            (report.clip_coef - torch).abs() <= unit,
            "coefficient {:e}, the formula of torch gives {torch:e}",
            report.clip_coef
        );
    }
    if !report.written {
        untouched(golden, outcome)?;
    }
    judge_products(golden, outcome, report.multiplier)?;
    judge_elements(golden, outcome, relative)
}

/// Every element is its product with the one multiplier, to one unit in the last place; zeros keep their sign. One that is
/// not finite is what IEEE 754 makes of it, or untouched under a multiplier of 1.
fn judge_products(golden: &Golden, outcome: &Outcome, multiplier: f64) -> Verdict {
    for (tensor, (before, after)) in golden.case.grads.iter().zip(&outcome.grads).enumerate() {
        let format = before.format();
        for (index, (x, got)) in before.bits().into_iter().zip(after.bits()).enumerate() {
            if !format.is_finite(x) {
                let (x, got) = (format.value(x), format.value(got));
                require!(identical(got, x * multiplier), "{x} * {multiplier} is {got}");
                continue;
            }
            let exact = product(format, x, multiplier);
            let sign_kept = (got & format.sign_bit() != 0) == exact.negative;
            require!(
                sign_kept && within_one_unit(format, &exact, got),
                "element {index} of tensor {tensor} is {:e}, x * c is {:e}",
                format.value(got),
                format.value(format.nearest(&exact))
            );
        }
    }
    Ok(())
}

/// Every element against the true gradients, and against those of a peer that is right.
fn judge_elements(golden: &Golden, outcome: &Outcome, norm_error: f64) -> Verdict {
    let exact_grads = golden.exact_grads.as_ref().ok_or("the file has no gradients")?;
    require!(exact_grads.len() == outcome.grads.len(), "{} tensors", outcome.grads.len());
    for (tensor, (exact, after)) in exact_grads.iter().zip(&outcome.grads).enumerate() {
        let format = exact.format();
        let peer = if golden.peer_differs.is_none() { peer_values(golden, tensor) } else { None };
        for (index, (exact, got)) in exact.bits().into_iter().zip(after.bits()).enumerate() {
            // One step for the rounding, and what the error of the norm amounts to: nothing visible but in f64.
            let (exact, value) = (format.value(exact), format.value(got));
            if !exact.is_finite() {
                let peer = peer.as_ref().map_or(exact, |peer| peer[index]);
                require!(identical(value, exact) && identical(peer, exact), "{value:e}, {peer:e}, exact {exact:e}");
                continue;
            }
            let allowed = format.unit(exact) * tolerance::ROUNDING_STEPS as f64 + norm_error * exact.abs();
            require!(
                (value - exact).abs() <= allowed,
                "element {index} of tensor {tensor} is {value:e}, exact {exact:e}"
            );
            if let Some(peer) = peer.as_ref().map(|peer| peer[index]) {
                let allowed = allowed + tolerance::peer_element(&golden.case.grads, format, exact);
                require!(
                    (value - peer).abs() <= allowed,
                    "element {index} of tensor {tensor} is {value:e}, {} has {peer:e}",
                    golden.peer
                );
            }
        }
    }
    Ok(())
}

/// A norm that is NaN or Inf: what each policy has to do.
fn judge_policies(golden: &Golden, exact: f64, max_norm: f64, run: &impl Fn(&Case) -> Outcome) -> Verdict {
    for policy in [NonFinite::Skip, NonFinite::Zero, NonFinite::Propagate, NonFinite::Error] {
        let mut case = golden.case.clone();
        if let Op::ClipNorm { nonfinite, .. } | Op::ClipWithNorm { nonfinite, .. } = &mut case.op {
            *nonfinite = policy;
        }
        judge_policy(golden, exact, max_norm, policy, &run(&case)).map_err(|what| format!("{policy:?}: {what}"))?;
    }
    Ok(())
}

fn judge_policy(golden: &Golden, exact: f64, max_norm: f64, policy: NonFinite, outcome: &Outcome) -> Verdict {
    let first = golden.case.first_nonfinite();
    let loss_scale = golden.case.loss_scale();
    require!(golden.peer_found_inf != Some(false), "{} found no overflow", golden.peer);
    if policy == NonFinite::Error {
        return judge_refused(
            golden,
            outcome,
            |error| matches!(*error, Error::NonFinite { total_norm, tensor } if same(total_norm, exact) && tensor == first),
        );
    }
    let report = norm_report(outcome)?;
    require!(same(report.total_norm, exact), "norm {}, not {exact}", report.total_norm);
    require!(report.first_nonfinite == first, "first bad tensor {:?}, not {first:?}", report.first_nonfinite);
    // An infinite threshold only measures, or removes a loss scale, also where the peers make NaN of Inf / Inf.
    let written = policy != NonFinite::Skip && (max_norm.is_finite() || loss_scale != 1.0);
    require!(report.written == written && report.found_inf, "{report:?}");
    if !written {
        require!(report.clip_coef == 1.0 && report.multiplier == 1.0, "{report:?}");
        return untouched(golden, outcome);
    }
    if policy == NonFinite::Zero {
        require!(report.clip_coef == 0.0 && report.multiplier == 0.0, "{report:?}");
        let all_zero = bits_of(&outcome.grads).iter().flatten().all(|&bits| bits == 0);
        require!(all_zero, "an element is not +0");
        return Ok(());
    }
    let clip_coef = if max_norm.is_finite() { max_norm / exact } else { 1.0 };
    require!(same(report.clip_coef, clip_coef) && same(report.multiplier, clip_coef / loss_scale), "{report:?}");
    judge_propagated(golden, outcome, report.multiplier, max_norm.is_finite())
}

/// x * m where one of them is not finite: as IEEE 754 has it, and as a peer has it (`like_peer`) that was not asked to be
/// right. Where m is an ordinary number the product is rounded.
fn judge_propagated(golden: &Golden, outcome: &Outcome, multiplier: f64, like_peer: bool) -> Verdict {
    for (tensor, (before, after)) in golden.case.grads.iter().zip(&outcome.grads).enumerate() {
        let peer = if like_peer { peer_values(golden, tensor) } else { None };
        for (index, (x, got)) in before.values().into_iter().zip(after.values()).enumerate() {
            let expected = before.format().value(nearest(before.dtype(), x * multiplier));
            let peer = peer.as_ref().map_or(expected, |peer| peer[index]);
            let at = format!("element {index} of tensor {tensor}");
            require!(identical(got, expected), "{at} is {got}, {x} * {multiplier} is {expected}");
            require!(identical(got, peer), "{at} is {got}, {} has {peer}", golden.peer);
        }
    }
    Ok(())
}

fn peer_values(golden: &Golden, tensor: usize) -> Option<Vec<f64>> {
    golden.peer_grads.as_ref().map(|tensors| tensors[tensor].values())
}

/// The same bits, or both NaN.
fn identical(a: f64, b: f64) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}

fn judge_clip_value(golden: &Golden, outcome: &Outcome) -> Verdict {
    let report = match &outcome.answer {
        Ok(Answer::Value(report)) => *report,
        other => return Err(format!("answered {other:?}")),
    };
    let exact_grads = golden.exact_grads.as_ref().ok_or("the file has no gradients")?;
    let (before, exact, after) = (bits_of(&golden.case.grads), bits_of(exact_grads), bits_of(&outcome.grads));
    require!(after == exact, "gradients are {after:x?}, exact {exact:x?}");
    // Inside the bounds, and as a NaN, an element keeps its bits; outside it cannot.
    let clipped = before.iter().flatten().zip(exact.iter().flatten()).filter(|(x, y)| x != y).count() as u64;
    let nan = golden.case.grads.iter().flat_map(Tensor::values).filter(|x| x.is_nan()).count() as u64;
    require!(report.clipped == clipped, "{} clipped, not {clipped}", report.clipped);
    require!(report.nan == nan, "{} NaN, not {nan}", report.nan);
    require!(report.written == (clipped > 0), "{report:?}");
    let first = first_nonfinite(&golden.case.grads);
    require!(report.first_nonfinite == first, "first bad tensor {:?}, not {first:?}", report.first_nonfinite);
    if let (Some(peer), None) = (&golden.peer_grads, &golden.peer_differs) {
        for (peer, after) in peer.iter().zip(&outcome.grads) {
            let equal = peer.values().into_iter().zip(after.values()).all(|(a, b)| same(a, b));
            require!(equal, "{} has other gradients", golden.peer);
        }
    }
    Ok(())
}
