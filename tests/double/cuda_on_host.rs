//! CUDA threads as fibers: the mistakes they and the sanitizers have to notice, and that right kernels are left alone.

use std::process::Output;

use crate::support::runner::{Case, Dtype, Operation, Outcome, Runner, Tensor};
use gradclip::NormType;

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[track_caller]
fn assert_clean(output: &Output, printed: &str) {
    assert!(output.status.success() && output.stderr.is_empty(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout).trim(), printed);
}

#[track_caller]
fn assert_reported(output: &Output, message: &str) {
    let stderr = text(&output.stderr);
    assert!(
        !output.status.success() && stderr.contains(message),
        "{message:?} is not in {:?}:\n{stderr}",
        output.status
    );
}

const BLOCK_SUMS: &str = "32640 98176 163712";

#[test]
fn divergence_and_misalignment_abort_with_a_message() {
    let Some(runner) = Runner::new("") else { return };
    assert_clean(&runner.run_toy("block_sums"), BLOCK_SUMS);
    assert_clean(&runner.run_toy("unwritten_shared"), "0xffffffff");
    let diverged = runner.run_toy("divergent_shuffle");
    assert_reported(&diverged, "toy_divergent_shuffle, block 0 of 1");
    assert_reported(&diverged, "diverged at a shuffle of all 32 lanes: lanes 0,2,4,6");
    let missing = "100 threads of 256 wait at a barrier that the others never reach: 156 have returned";
    assert_reported(&runner.run_toy("divergent_barrier"), missing);
    assert_reported(&runner.run_toy("misaligned_pack"), "a load of 16 bytes at the misaligned address");
}

#[test]
fn the_thread_sanitizer_finds_a_missing_barrier() {
    let Some(runner) = Runner::new("thread") else { return };
    assert_clean(&runner.run_toy("block_sums"), BLOCK_SUMS);
    let race = runner.run_toy("missing_barrier");
    assert_reported(&race, "ThreadSanitizer: data race");
    assert_reported(&race, "toy_missing_barrier");
    assert_reported(&runner.run_toy("block_race"), "ThreadSanitizer: data race");
    assert_clean(&runner.run_toy("copy_packs"), "");
}

#[test]
fn the_address_sanitizer_finds_a_read_past_the_end() {
    let Some(runner) = Runner::new("address,undefined") else { return };
    assert_clean(&runner.run_toy("block_sums"), BLOCK_SUMS);
    assert_clean(&runner.run_toy("copy_packs"), "");
    assert_reported(&runner.run_toy("read_past_end"), "AddressSanitizer: heap-buffer-overflow");
    assert_reported(&runner.run_toy("shared_past_end"), "AddressSanitizer: use-after-poison");
}

/// Tensors of one dtype at every kind of place: empty, one element, a whole tile and a bit, misaligned.
fn tensors(dtype: Dtype) -> Vec<Tensor> {
    let element = |i: usize| match dtype {
        Dtype::F32 => (1.0 + (i % 97) as f32).to_le_bytes().to_vec(),
        Dtype::F64 => (1.0 + (i % 97) as f64).to_le_bytes().to_vec(),
        Dtype::F16 => (0x3c00 + (i % 97) as u16).to_le_bytes().to_vec(),
        Dtype::BF16 => (0x3f80 + (i % 97) as u16).to_le_bytes().to_vec(),
    };
    let elements_per_tile = 32 * 1024 / dtype.size();
    [(0, 0), (1, 1), (elements_per_tile + 5, 0), (2 * elements_per_tile + 3, 1), (33, 3)]
        .map(|(numel, misaligned_elements)| Tensor {
            dtype,
            misalign: (misaligned_elements * dtype.size()) as u32,
            rows: 1,
            copies: 1,
            data: (0..numel).flat_map(element).collect(),
        })
        .to_vec()
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in [Dtype::F32, Dtype::F64, Dtype::F16, Dtype::BF16] {
        for norm_type in [NormType::L1, NormType::L2, NormType::Inf, NormType::P(3.0), NormType::Rms] {
            cases.push((
                dtype,
                Operation::ClipNorm { max_norm: 1.0, eps: 0.0, loss_scale: 1.0, norm_type, nonfinite: 0 },
            ));
        }
        let bound = if dtype.size() == 2 { 1.0 } else { 9.0 };
        cases.push((dtype, Operation::ClipValue { lo: -bound, hi: bound }));
    }
    let case = |(dtype, operation)| Case {
        tensors: tensors(dtype),
        operation,
        table_in_memory: false,
        with_scales: true,
        blocks: 3,
        reversed: false,
    };
    cases.into_iter().map(case).collect()
}

fn bits(outcome: &Outcome) -> (Vec<u64>, u64, u64, &[Vec<u8>]) {
    let report = &outcome.report;
    let sums = outcome.sums.iter().map(|sum| sum.to_bits()).collect();
    (sums, report.total_norm.to_bits(), report.clip_coef.to_bits(), &outcome.tensors)
}

#[test]
fn the_kernels_are_clean_and_give_the_same_bits_in_any_order() {
    let Some(plain) = Runner::new("") else { return };
    let mut cases = cases();
    let expected = plain.run(&cases);
    let other_way = |case: &Case| Case { reversed: true, table_in_memory: true, blocks: 1, ..case.clone() };
    cases.extend(cases.iter().map(other_way).collect::<Vec<_>>());
    for sanitizer in ["", "address,undefined", "thread"] {
        let Some(runner) = Runner::new(sanitizer) else { continue };
        for (index, outcome) in runner.run(&cases).iter().enumerate() {
            let expected = &expected[index % expected.len()];
            assert!(bits(outcome) == bits(expected), "case {index} with -fsanitize={sanitizer:?}");
        }
    }
}
