//! Clippers, reports and the functions without a clipper, in more than one thread.

use crate::support::double;
use cudarc::driver::{CudaSlice, CudaStream};
use gradclip::cuda;
use gradclip::{ClipNorm, ClipValue, Error, NormType};
use std::cell::RefCell;
use std::sync::{mpsc, Arc};

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
