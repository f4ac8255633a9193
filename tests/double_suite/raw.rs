//! Gradients behind raw pointers: the good ones work, the others are refused before anything runs.

use crate::support::double;
use cudarc::driver::DevicePtr;
use gradclip::cuda::{self, Clipper, RawGrad};
use gradclip::{Dtype, Error, NormType};

fn raw(address: u64, numel: usize, dtype: Dtype) -> RawGrad {
    // SAFETY: of the tests below, each names memory that outlives its calls, or is refused before any work.
    unsafe { RawGrad::new(address, numel, dtype) }
}

#[test]
fn raw_grads_of_every_bad_kind() {
    let Some(double) = double::lock() else { return };
    let stream = cuda::context(0).unwrap().default_stream();
    let other = cuda::context(1).unwrap().default_stream();
    let slice = stream.clone_htod(&[3.0f32, 4.0, 0.0, 0.0]).unwrap();
    let there = other.clone_htod(&[1.0f32; 4]).unwrap();
    let (address, away) = (slice.device_ptr(&stream).0, there.device_ptr(&other).0);
    let on_host = [0f64; 4];
    let host = on_host.as_ptr() as u64;
    let to_the_end = (usize::MAX - address as usize) / 4;
    let mut clipper = Clipper::new(&stream).unwrap();
    let bad = [
        (0, 1, Dtype::F32),
        (0, usize::MAX, Dtype::F64),
        (1, 1, Dtype::F16),
        (host, 1, Dtype::F64),
        (away, 1, Dtype::F32),
        (address + 1, 1, Dtype::F16),
        (address + 2, 1, Dtype::F32),
        (address + 4, 1, Dtype::F64),
        (address, 1 << 40, Dtype::F32),
        (address, usize::MAX, Dtype::F32),
        (address, usize::MAX, Dtype::F16),
        (address, 1 << 62, Dtype::F32),
        (address, (1 << 62) + 1, Dtype::F32),
        (address, (1 << 61) + 1, Dtype::F64),
        (address, 1 << 63, Dtype::BF16),
        (address, to_the_end, Dtype::F32),
        (address, to_the_end + 1, Dtype::F32),
        (u64::MAX, 1, Dtype::F16),
        (u64::MAX - 1, 1, Dtype::F16),
        (u64::MAX - 3, 1, Dtype::F32),
        (address + 16, 1, Dtype::F32),
        (address + 12, 2, Dtype::F32),
        (address + 14, 2, Dtype::F16),
    ];
    for (address, numel, dtype) in bad {
        let errors = [
            (0, clipper.total_norm(&[raw(address, numel, dtype)], NormType::L2).unwrap_err()),
            (0, clipper.clip_grad_norm(&mut [raw(address, numel, dtype)], 1.0).unwrap_err()),
            (0, clipper.clip_grad_value(&mut [raw(address, numel, dtype)], 1.0).unwrap_err()),
            (1, clipper.clip_grad_value(&mut [raw(0, 0, dtype), raw(address, numel, dtype)], 1.0).unwrap_err()),
        ];
        for (index, error) in errors {
            let (Error::BadPointer { tensor, .. } | Error::Misaligned { tensor, .. } | Error::TooLarge { tensor, .. }) =
                error
            else {
                panic!("{address:#x} {numel} {dtype}: {error:?}")
            };
            assert_eq!(tensor, index);
        }
    }
    assert_eq!((double.counters().launches, double.counters().faults), (0, 0));
}

#[test]
fn raw_grads_that_are_empty_or_share_memory() {
    let Some(double) = double::lock() else { return };
    let stream = cuda::context(0).unwrap().default_stream();
    let slice = stream.clone_htod(&[3.0f32, 4.0, 0.0, 0.0]).unwrap();
    let address = slice.device_ptr(&stream).0;
    let mut clipper = Clipper::new(&stream).unwrap();
    // No element, so no address: any will do.
    for address in [0, 1, u64::MAX] {
        let report = clipper.clip_grad_norm(&mut [raw(address, 0, Dtype::F64)], 1.0).unwrap().wait().unwrap();
        assert_eq!((report.total_norm, report.written), (0.0, false));
    }
    let twice = [raw(address, 2, Dtype::F32), raw(address, 2, Dtype::F32)];
    let one_byte = [raw(address + 6, 1, Dtype::F16), raw(address, 2, Dtype::F32)];
    for list in [twice, one_byte] {
        assert_eq!(clipper.total_norm(&list, NormType::L2).unwrap_err(), Error::Overlap { first: 0, second: 1 });
    }
    let adjacent = [raw(address + 8, 4, Dtype::F16), raw(address, 2, Dtype::F32), raw(address + 4, 0, Dtype::F64)];
    assert_eq!(clipper.total_norm(&adjacent, NormType::L2).unwrap().wait().unwrap().total_norm, 5.0);
    assert_eq!((double.violated_guards(), double.counters().faults), (0, 0));
}

/// A raw pointer is looked up although the address was a slice's in the last call.
#[test]
fn a_raw_pointer_to_what_was_a_slice_is_looked_up() {
    let Some(double) = double::lock() else { return };
    let stream = cuda::context(0).unwrap().default_stream();
    let mut clipper = Clipper::new(&stream).unwrap();
    let slice = stream.clone_htod(&[3.0f32, 4.0]).unwrap();
    let address = slice.device_ptr(&stream).0;
    let questions = || double.log().iter().filter(|name| *name == "cuPointerGetAttributes").count();
    // Slice, raw, raw again, slice, raw: only what changes is asked about, and only if it is raw.
    let mut asked = Vec::new();
    for is_raw in [false, true, true, false, true] {
        let before = questions();
        if is_raw {
            clipper.total_norm(&[raw(address, 2, Dtype::F32)], NormType::L2).unwrap().wait().unwrap();
        } else {
            clipper.total_norm(&[&slice], NormType::L2).unwrap().wait().unwrap();
        }
        asked.push(questions() > before);
    }
    assert_eq!(asked, [false, true, false, false, true]);

    clipper.total_norm(&[&slice], NormType::L2).unwrap().wait().unwrap();
    drop(slice);
    stream.synchronize().unwrap();
    let error = clipper.total_norm(&[raw(address, 2, Dtype::F32)], NormType::L2).unwrap_err();
    assert!(matches!(error, Error::BadPointer { .. }), "{error}");
    assert_eq!(double.counters().faults, 0);
}

/// One driver call for each pointer of a new list, none for the list of last time, none where it was so asked for.
#[test]
fn the_driver_is_asked_once_and_only_where_wanted() {
    let Some(double) = double::lock() else { return };
    let stream = cuda::context(0).unwrap().default_stream();
    let slice = stream.clone_htod(&[3.0f32, 4.0, 12.0, 84.0]).unwrap();
    let address = slice.device_ptr(&stream).0;
    let mut clipper = Clipper::new(&stream).unwrap();
    let list = |first: usize| [raw(address + 4 * first as u64, 1, Dtype::F32), raw(address + 8, 2, Dtype::F32)];
    let mut calls = |list: &[RawGrad]| {
        double.reset_counters();
        clipper.total_norm(list, NormType::L2).unwrap();
        double.counters().calls
    };
    calls(&list(0));
    let same = calls(&list(0));
    assert_eq!(calls(&list(1)), same + 2);
    assert_eq!(calls(&list(0).map(RawGrad::not_looked_up)), same);
    assert_eq!(calls(&list(0)), same + 2, "looked up now, since it was not");
    let error = clipper.total_norm(&[raw(address + 2, 1, Dtype::F32).not_looked_up()], NormType::L2).unwrap_err();
    assert!(matches!(error, Error::Misaligned { .. }), "{error}");
}
