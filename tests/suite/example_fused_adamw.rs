//! The example runs: both ways from the gradient to the step give the same weights, training ends near the truth, and the
//! steps that overflow are left out.

use super::fused_adamw::{gradient_bytes, step_bytes, train, End, Way};
use crate::backend::with_clipper;

fn bits(end: &End) -> Vec<u32> {
    end.weights.iter().map(|w| w.to_bits()).collect()
}

#[test]
fn the_fused_step_trains_as_the_one_after_a_clip() {
    with_clipper(|clipper| {
        let context = clipper.stream().context();
        let steps = 240;
        for seed in [1, 2] {
            let written = train(context, seed, steps, Way::ClipThenStep).unwrap();
            let handed = train(context, seed, steps, Way::HandOff).unwrap();
            assert_eq!(bits(&handed), bits(&written));
            let at_start = train(context, seed, 0, Way::HandOff).unwrap();
            assert!(handed.off < at_start.off / 5.0, "{} of {}", handed.off, at_start.off);
            // Each fortieth batch overflows and halves the scale, which was doubled after 25 good ones.
            assert_eq!((handed.steps_left_out, handed.loss_scale), (steps / 40, 65536.0));
            for (step, (ours, theirs)) in handed.reports.iter().zip(&written.reports).enumerate() {
                assert_eq!(ours.total_norm.to_bits(), theirs.total_norm.to_bits());
                assert_eq!(ours.found_inf, (step + 1) % 40 == 0);
                assert_eq!((ours.multiplier, ours.written), (theirs.multiplier, false));
                assert_eq!(theirs.written, !ours.found_inf);
            }
            assert!(handed.reports.iter().any(|report| report.clip_coef < 1.0));
        }
    });
}

#[test]
fn half_of_the_gradient_traffic_is_saved() {
    assert_eq!((gradient_bytes(10, Way::ClipThenStep), gradient_bytes(10, Way::HandOff)), (160, 80));
    assert_eq!((step_bytes(10, Way::ClipThenStep), step_bytes(10, Way::HandOff)), (400, 320));
}
