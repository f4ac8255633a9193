//! Clipping out of place, host arithmetic only: which outputs can take which gradients.

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::plan::{Plan, TensorRef};

/// All others would round a gradient to fewer bits than it has, or hold no more of it than f32 does; and each is code to
/// load (16 pairs instead of 7: three times the PTX).
pub(crate) fn can_take(output: Dtype, gradient: Dtype) -> bool {
    output == gradient || output == Dtype::F32
}

/// What is wrong with the list of outputs alone.
pub(crate) fn in_outputs(error: Error) -> Error {
    Error::Outputs(Box::new(error))
}

/// Each output against its gradient.
pub(crate) fn check_pairs(gradients: &[TensorRef], outputs: &[TensorRef]) -> Result<()> {
    if gradients.len() != outputs.len() {
        return Err(Error::OutputCount { gradients: gradients.len(), outputs: outputs.len() });
    }
    for (tensor, (gradient, output)) in gradients.iter().zip(outputs).enumerate() {
        if gradient.numel != output.numel {
            return Err(Error::OutputNumel { tensor, gradient: gradient.numel, output: output.numel });
        }
        if !can_take(output.dtype, gradient.dtype) {
            return Err(Error::OutputDtype { tensor, gradient: gradient.dtype, output: output.dtype });
        }
    }
    Ok(())
}

/// Refuses memory that both lists have. One pass: the spans of a plan are sorted, and do not overlap among themselves.
pub(crate) fn refuse_shared(gradients: &Plan, outputs: &Plan) -> Result<()> {
    let (mut gradients, mut outputs) = (gradients.spans().iter().peekable(), outputs.spans().iter().peekable());
    while let (Some(&&(begin, end, gradient)), Some(&&(output_begin, output_end, output))) =
        (gradients.peek(), outputs.peek())
    {
        if end <= output_begin {
            gradients.next();
        } else if output_end <= begin {
            outputs.next();
        } else {
            return Err(Error::OutputOverlapsGradient { output, gradient });
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn plan(spans: &[(u64, u64)]) -> Plan {
        let bytes = |&(address, numel): &(u64, u64)| TensorRef { address, numel, dtype: Dtype::F16 };
        let mut plan = Plan::default();
        plan.update(&spans.iter().map(bytes).collect::<Vec<_>>()).unwrap();
        plan
    }

    /// Against every pair of intervals.
    #[test]
    fn shared_memory_is_found_wherever_it_is() {
        let at = |slots: u32| -> Vec<(u64, u64)> {
            (0..6).filter(|i| slots >> (2 * i) & 3 > 0).map(|i| (64 + 6 * i, u64::from(slots >> (2 * i) & 3))).collect()
        };
        let mut refused = 0;
        for gradients in (0..4096).step_by(7) {
            for outputs in (0..4096).step_by(11) {
                let (gradients, outputs) = (at(gradients), at(outputs).iter().map(|&(a, n)| (a + 4, n)).collect());
                let outputs: Vec<(u64, u64)> = outputs;
                let share = |g: &(u64, u64), o: &(u64, u64)| g.0 < o.0 + 2 * o.1 && o.0 < g.0 + 2 * g.1;
                let any = gradients.iter().any(|g| outputs.iter().any(|o| share(g, o)));
                let result = refuse_shared(&plan(&gradients), &plan(&outputs));
                match result {
                    Ok(()) => assert!(!any, "{gradients:?} {outputs:?}"),
                    Err(Error::OutputOverlapsGradient { output, gradient }) => {
                        refused += 1;
                        assert!(share(&gradients[gradient], &outputs[output]), "{gradients:?} {outputs:?}");
                    }
                    Err(other) => panic!("{other}"),
                }
            }
        }
        assert!(refused > 1000);
        // Empties share nothing, wherever they are; the same memory is refused.
        refuse_shared(&plan(&[(64, 8)]), &plan(&[(66, 0), (80, 2)])).unwrap();
        assert_eq!(
            refuse_shared(&plan(&[(0, 0), (64, 8)]), &plan(&[(64, 8)])).unwrap_err(),
            Error::OutputOverlapsGradient { output: 0, gradient: 1 }
        );
    }
}
