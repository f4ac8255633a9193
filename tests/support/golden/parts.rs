//! Cases in which not all gradients share one norm: each part that has one is a case of its own.

use super::super::tensor::Tensor;
use super::{identical, judge_clip_norm, judge_policy, judge_total_norm, Answer, Case, Golden, Op, Outcome, Verdict};
use std::ops::Range;

/// What shares a norm.
#[derive(Clone, Debug)]
pub enum Sharing {
    Tensor,
    Group { of: Vec<usize>, max_norms: Vec<Option<f64>> },
    Row(Vec<usize>),
}

impl Sharing {
    /// Of each part, the tensors or pieces of tensors that it is made of.
    fn parts(&self, grads: &[Tensor]) -> Vec<Vec<(usize, Range<usize>)>> {
        let whole = |tensor: usize| (tensor, 0..grads[tensor].numel());
        match self {
            Self::Tensor => (0..grads.len()).map(|tensor| vec![whole(tensor)]).collect(),
            Self::Group { of, max_norms } => {
                let members = |group| (0..grads.len()).filter(move |&tensor| of[tensor] == group).map(whole).collect();
                (0..max_norms.len()).map(members).collect()
            }
            Self::Row(rows) => {
                let of_tensor = |(tensor, &rows): (usize, &usize)| {
                    let numel = grads[tensor].numel() / rows;
                    (0..rows).map(move |row| vec![(tensor, row * numel..(row + 1) * numel)])
                };
                rows.iter().enumerate().flat_map(of_tensor).collect()
            }
        }
    }
}

fn pieces(tensors: &[Tensor], part: &[(usize, Range<usize>)]) -> Vec<Tensor> {
    let piece = |(tensor, range): &(usize, Range<usize>)| {
        Tensor::from_bits(tensors[*tensor].dtype(), tensors[*tensor].bits()[range.clone()].iter().copied())
    };
    part.iter().map(piece).collect()
}

/// Each part that has a norm, by the judge of calls in which there is one norm.
pub fn judge(golden: &Golden, outcome: &Outcome) -> Verdict {
    let Some(sharing) = &golden.case.sharing else { return judge_part(golden, outcome) };
    let Ok(Answer::Norms(report)) = &outcome.answer else { return Err(format!("answered {:?}", outcome.answer)) };
    let parts = sharing.parts(&golden.case.grads);
    require!(report.groups.len() == parts.len(), "{} norms of {} parts", report.groups.len(), parts.len());
    for (index, (part, group)) in parts.iter().zip(&report.groups).enumerate() {
        // In the report of a list, the index of the tensor; here the list is this part.
        let mut alone = *group;
        let place = |tensor: usize| part.iter().position(|(of, _)| *of == tensor);
        alone.first_nonfinite = group.first_nonfinite.and_then(place);
        require!(alone.first_nonfinite.is_some() == group.first_nonfinite.is_some(), "part {index}: {group:?}");
        let of_part = Outcome { answer: Ok(Answer::Norm(alone)), grads: pieces(&outcome.grads, part) };
        judge_part(&part_of(golden, index, part)?, &of_part).map_err(|what| format!("part {index}: {what}"))?;
    }
    Ok(())
}

/// One part of a case as a case.
fn part_of(golden: &Golden, index: usize, part: &[(usize, Range<usize>)]) -> Result<Golden, String> {
    let of_part = |tensors: &Option<Vec<Tensor>>| tensors.as_ref().map(|tensors| pieces(tensors, part));
    let mut case = Case { grads: pieces(&golden.case.grads, part), sharing: None, ..golden.case.clone() };
    if let (Some(Sharing::Group { max_norms, .. }), Op::ClipNorm { max_norm, .. }) =
        (&golden.case.sharing, &mut case.op)
    {
        *max_norm = max_norms[index].unwrap_or(f64::INFINITY);
    }
    let norms = golden.exact_norms.as_ref().ok_or("the file has no norms")?;
    Ok(Golden {
        case,
        exact_norm: Some(*norms.get(index).ok_or("the file has no norm of it")?),
        peer_norm: golden.peer_norms.as_ref().map(|norms| norms[index]),
        exact_grads: of_part(&golden.exact_grads),
        peer_grads: of_part(&golden.peer_grads),
        ..golden.clone()
    })
}

fn judge_part(golden: &Golden, outcome: &Outcome) -> Verdict {
    let (max_norm, nonfinite) = match golden.case.op {
        Op::TotalNorm(_) => return judge_total_norm(golden, outcome),
        Op::ClipNorm { max_norm, nonfinite, .. } => (max_norm, nonfinite),
        _ => return Err("no clip_grad_norm".into()),
    };
    let exact = golden.exact_norm.ok_or("the file has no norm")?;
    if exact.is_finite() {
        return judge_clip_norm(golden, outcome);
    }
    // A peer that differs is no measure.
    let peer_grads = golden.peer_grads.clone().filter(|_| golden.peer_differs.is_none());
    judge_policy(&Golden { peer_grads, ..golden.clone() }, exact, max_norm, nonfinite, outcome)?;
    let exact_grads = golden.exact_grads.as_ref().ok_or("the file has no gradients")?;
    for (after, exact) in outcome.grads.iter().zip(exact_grads) {
        let equal = after.values().into_iter().zip(exact.values()).all(|(after, exact)| identical(after, exact));
        require!(equal, "gradients are {after:?}, expected {exact:?}");
    }
    Ok(())
}
