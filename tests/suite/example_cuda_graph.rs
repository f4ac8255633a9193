//! The example runs: its graph clips by the threshold that is on the device at each replay, and training gains by it.

use super::cuda_graph::train;
use crate::backend::with_clipper;

#[test]
fn the_captured_step_follows_the_threshold() {
    with_clipper(|clipper| {
        let context = clipper.stream().context();
        let steps = 120;
        let (log, with) = train(context, 1, steps, true).unwrap();
        assert_eq!((log.len(), log[0].max_norm, log[0].report.written), (steps, f64::INFINITY, false));
        for step in &log {
            let (max_norm, report) = (step.max_norm, step.report);
            let clipped = report.total_norm > max_norm;
            let coef = if clipped { max_norm / report.total_norm } else { 1.0 };
            assert_eq!((report.written, report.clip_coef), (clipped, coef));
        }
        assert!(log.iter().any(|step| step.report.written));
        let (log, without) = train(context, 1, steps, false).unwrap();
        assert!(log.iter().all(|step| !step.report.written));
        assert!(with < without / 2.0, "with clipping {with}, without {without}");
    });
}
