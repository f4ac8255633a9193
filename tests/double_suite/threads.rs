//! Clippers, reports and the functions without a clipper, in more than one thread.

use crate::support::double;
use cudarc::driver::{CudaSlice, CudaStream};
use gradclip::cuda::{self, Clipper, Pending};
use gradclip::{ClipNorm, ClipValue, Error, NormReport, NormType, Scope, REPORTS_KEPT};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::{mpsc, Arc};
use std::time::{Duration, Instant};

const NONE: &[CudaSlice<f32>] = &[];

/// A thread that used the functions without a clipper ends, and leaves nothing behind.
#[test]
fn a_thread_that_keeps_clippers_ends() {
    let Some(double) = double::lock() else { return };
    {
        let context = cuda::context(0).unwrap();
        let stream = context.default_stream();
        for _ in 0..20 {
            let stream = stream.clone();
            std::thread::spawn(move || {
                cuda::total_norm(&stream, NONE, NormType::L2).unwrap().wait().unwrap();
            })
            .join()
            .unwrap();
        }
    }
    assert_eq!((double.live_allocations(), double.live_handles()), (0, 0));
}

/// A threshold whose conversion uses the thread's clippers itself.
struct FromNorm(Arc<CudaStream>);

impl From<FromNorm> for ClipNorm {
    fn from(FromNorm(stream): FromNorm) -> Self {
        let norm = cuda::total_norm(&stream, NONE, NormType::L2).unwrap().wait().unwrap();
        Self::new(norm.total_norm + 1.0)
    }
}

impl From<FromNorm> for ClipValue {
    fn from(_: FromNorm) -> Self {
        cuda::release_thread_clippers();
        Self::new(1.0)
    }
}

#[test]
fn a_threshold_that_is_itself_computed_by_the_thread_clipper() {
    let Some(_double) = double::lock() else { return };
    let stream = cuda::context(0).unwrap().default_stream();
    let mut grads = [stream.clone_htod(&[3.0f32, 4.0]).unwrap()];
    let report = cuda::clip_grad_norm(&stream, &mut grads, FromNorm(stream.clone())).unwrap().wait().unwrap();
    assert_eq!((report.total_norm, report.clip_coef), (5.0, 0.2));
    let report = cuda::clip_grad_value(&stream, &mut grads, FromNorm(stream.clone())).unwrap().wait().unwrap();
    assert_eq!(report.clipped, 0);
    cuda::release_thread_clippers();
}

#[test]
fn from_a_destructor_of_a_thread_local() {
    struct AtExit(Arc<CudaStream>, mpsc::Sender<Option<Error>>);
    impl Drop for AtExit {
        fn drop(&mut self) {
            let answer = cuda::total_norm(&self.0, NONE, NormType::L2).map(drop).err();
            cuda::release_thread_clippers();
            let _ = self.1.send(answer);
        }
    }
    thread_local!(static LAST: RefCell<Option<AtExit>> = const { RefCell::new(None) });

    let Some(_double) = double::lock() else { return };
    let stream = cuda::context(0).unwrap().default_stream();
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        // Used first, destroyed last.
        LAST.with_borrow_mut(|last| *last = Some(AtExit(stream.clone(), sender)));
        cuda::total_norm(&stream, NONE, NormType::L2).unwrap().wait().unwrap();
    })
    .join()
    .unwrap();
    assert_eq!(receiver.recv(), Ok(Some(Error::ThreadEnding)));
}

/// The per-thread default stream is another stream in each thread: a clipper for it, and its reports, are refused in
/// another thread, where they would wait for the wrong one.
#[test]
fn a_clipper_of_a_per_thread_stream_used_in_another_thread() {
    let Some(double) = double::lock() else { return };
    let context = cuda::context(0).unwrap();
    let stream = context.per_thread_stream();
    let mut clipper = Clipper::new(&stream).unwrap();
    let mut grads = [stream.clone_htod(&[3.0f32, 4.0]).unwrap()];
    clipper.clip_grad_norm(&mut grads, 100.0).unwrap().wait().unwrap();
    double.set_deferred(true);
    let first = clipper.clip_grad_norm(&mut grads, 2.5).unwrap();
    let launches = double.counters().launches;
    std::thread::scope(|scope| {
        let (clipper, grads, first) = (&mut clipper, &mut grads, &first);
        scope.spawn(move || {
            let wrong_thread = Some(Error::WrongThread);
            assert_eq!(first.wait().err(), wrong_thread);
            assert_eq!(clipper.clip_grad_norm(grads, 1.0).err(), wrong_thread);
            assert_eq!(clipper.clip_grad_value(grads, 1.0).err(), wrong_thread);
            assert_eq!(clipper.total_norm(grads, NormType::L2).err(), wrong_thread);
        });
    });
    assert_eq!(double.counters().launches, launches);
    assert_eq!(first.wait().unwrap().total_norm, 5.0);
    assert_eq!(clipper.clip_grad_norm(&mut grads, 1.0).unwrap().wait().unwrap().total_norm, 2.5);
}

/// Dropped in another thread, it frees nothing under the work of its own.
#[test]
fn a_clipper_of_a_per_thread_stream_dropped_in_another_thread() {
    let Some(double) = double::lock() else { return };
    for memory_pools in [true, false] {
        double.reset();
        double.set_memory_pools(memory_pools);
        let context = cuda::context(0).unwrap();
        let stream = context.per_thread_stream();
        let mut clipper = Clipper::new(&stream).unwrap();
        let mut grads = [stream.clone_htod(&vec![1.0f32; 20_000]).unwrap()];
        double.set_deferred(true);
        let report = clipper.clip_grad_norm(&mut grads, 1.0).unwrap();
        let there = stream.clone();
        let dropped = std::thread::spawn(move || {
            drop((clipper, report));
            there.synchronize().unwrap(); // another stream: not the one with the work
        });
        dropped.join().unwrap();
        stream.synchronize().unwrap();
        let norm = cuda::total_norm(&stream, &grads, NormType::L2).unwrap().wait().unwrap().total_norm;
        cuda::release_thread_clippers();
        assert!((norm - 1.0).abs() < 1e-6, "{norm}");
        drop(grads);
        stream.synchronize().unwrap();
        assert_eq!((double.violated_guards(), double.counters().faults, double.live_allocations()), (0, 0, 0));
    }
}

/// A report read while a later call takes its slot: expired, or right, but not that of the later call. A race, so it may
/// take some seconds to show.
#[test]
fn a_slot_taken_again_while_it_is_read() {
    let Some(_double) = double::lock() else { return };
    let stream = cuda::context(0).unwrap().new_stream().unwrap();
    let mut clipper = Clipper::new(&stream).unwrap();
    let slices: Vec<CudaSlice<f32>> = (0..7).map(|value| stream.clone_htod(&[value as f32]).unwrap()).collect();
    let (sender, receiver) = mpsc::sync_channel::<(f64, Pending<NormReport>)>(REPORTS_KEPT - 2);
    let reader = std::thread::spawn(move || {
        let mut backlog = VecDeque::new();
        for item in receiver {
            backlog.push_back(item);
            if backlog.len() < REPORTS_KEPT {
                continue;
            }
            let Some((expected, pending)) = backlog.pop_front() else { continue };
            match pending.wait() {
                Ok(report) => assert_eq!(report.total_norm, expected, "the report of a later call"),
                Err(error) => assert_eq!(error, Error::ReportExpired),
            }
        }
    });
    let end = Instant::now() + Duration::from_millis(2500);
    for call in (0..7).cycle().take_while(|_| Instant::now() < end) {
        let pending = clipper.total_norm(&slices[call..=call], NormType::L2).unwrap();
        if sender.send((call as f64, pending)).is_err() {
            break; // the reader says why
        }
    }
    drop(sender);
    reader.join().unwrap();
}

#[test]
fn scoped_calls_without_a_clipper_in_sight() {
    let Some(double) = double::lock() else { return };
    {
        let context = cuda::context(0).unwrap();
        let stream = context.default_stream();
        let threads: Vec<_> = (1..4)
            .map(|thread| {
                let stream = stream.clone();
                std::thread::spawn(move || {
                    let scale = thread as f32;
                    let mut grads =
                        [&[3.0 * scale, 4.0 * scale][..], &[0.5]].map(|one| stream.clone_htod(one).unwrap());
                    let scope = Scope::per_tensor();
                    let norms = cuda::norms_by(&stream, &grads, &scope, NormType::L1).unwrap().wait().unwrap();
                    assert_eq!(
                        norms.groups.iter().map(|group| group.total_norm).collect::<Vec<_>>(),
                        [7.0 * f64::from(scale), 0.5]
                    );
                    // A threshold that is itself computed by the thread's clipper.
                    let clip = FromNorm(stream.clone());
                    let report = cuda::clip_grad_norm_by(&stream, &mut grads, &scope, clip).unwrap().wait().unwrap();
                    assert_eq!((report.num_written(), report.groups[1].clip_coef), (1, 1.0));
                    assert_eq!(stream.clone_dtoh(&grads[0]).unwrap(), [0.6, 0.8]);
                    assert!(cuda::clip_grad_norm_by(&stream, &mut grads, &scope, -1.0).is_err());
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
    assert_eq!((double.live_allocations(), double.live_handles(), double.violated_guards()), (0, 0, 0));
}
