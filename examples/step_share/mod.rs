//! The share of a training step that clipping takes: a module of the examples that train.
//!
//! On a CPU, the clock is read before and after each part. On a GPU, a CUDA event is recorded there on the stream that
//! trains, so that measuring makes nothing wait. The time between two events is the time that the stream took, and that
//! includes the gaps in which it had nothing to do because the host had not launched the next kernel yet.

use std::time::{Duration, Instant};

#[cfg(feature = "cuda")]
use gradclip::cuda::cudarc::driver::{sys::CUevent_flags, CudaEvent, CudaStream};
#[cfg(feature = "cuda")]
use std::sync::Arc;

/// Where the time of a training loop passes.
#[derive(Clone)]
pub enum Timeline {
    Clock,
    #[cfg(feature = "cuda")]
    #[allow(dead_code)] // a candle example built for the CPU alone makes none
    Stream(Arc<CudaStream>),
}

/// A moment on a timeline.
pub enum Mark {
    Clock(Instant),
    #[cfg(feature = "cuda")]
    Event(CudaEvent),
}

impl Timeline {
    /// Now, or when the stream will have done what was enqueued so far. Does not wait.
    pub fn mark(&self) -> anyhow::Result<Mark> {
        match self {
            Self::Clock => Ok(Mark::Clock(Instant::now())),
            #[cfg(feature = "cuda")]
            Self::Stream(stream) => Ok(Mark::Event(stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?)),
        }
    }
}

impl Mark {
    /// The time from here to `later`. Waits for the stream to get there.
    fn until(&self, later: &Self) -> anyhow::Result<Duration> {
        match (self, later) {
            (Self::Clock(start), Self::Clock(end)) => Ok(end.duration_since(*start)),
            #[cfg(feature = "cuda")]
            (Self::Event(start), Self::Event(end)) => {
                Ok(Duration::from_secs_f64(f64::from(start.elapsed_ms(end)?).max(0.0) / 1000.0))
            }
            #[cfg(feature = "cuda")]
            _ => anyhow::bail!("one mark is of a clock and one of a stream"),
        }
    }
}

/// The borders between the parts of a training step.
pub struct Borders {
    /// Before the forward pass.
    pub start: Mark,
    /// After the backward pass. What happens from here to `clip` does not count.
    pub backward: Mark,
    pub clip: Mark,
    pub clipped: Mark,
    /// After the optimizer's update.
    pub end: Mark,
}

/// What a step took, and the clip in it.
#[derive(Clone, Copy)]
pub struct StepTime {
    pub step: Duration,
    pub clip: Duration,
}

impl Borders {
    /// Waits for the stream to get to the end of the step.
    pub fn times(&self) -> anyhow::Result<StepTime> {
        Ok(StepTime {
            step: self.start.until(&self.backward)? + self.clip.until(&self.end)?,
            clip: self.clip.until(&self.clipped)?,
        })
    }
}

/// Two lines: the share of a step that clipping takes in each of two loops, and the times that it is made of.
///
/// The share is the median of the shares of all steps, the times are medians too: the first steps load modules and
/// allocate.
pub fn lines(timeline: &Timeline, loops: [(&str, &[StepTime]); 2]) -> String {
    let measured = match timeline {
        Timeline::Clock => "by the clock",
        #[cfg(feature = "cuda")]
        Timeline::Stream(_) => "between CUDA events, gaps in which the GPU waits for the host included",
    };
    let [(ours, of_ours), (theirs, of_theirs)] = loops;
    let share = |times: &[StepTime]| {
        median(times, |time| time.clip.as_secs_f64() / time.step.as_secs_f64().max(f64::MIN_POSITIVE)) * 100.0
    };
    let medians = |times: &[StepTime]| {
        let (clip, step) =
            (median(times, |time| time.clip.as_secs_f64()), median(times, |time| time.step.as_secs_f64()));
        format!("{:.1} us of {:.0} us ({} steps)", 1e6 * clip, 1e6 * step, times.len())
    };
    format!(
        "clipping: {:.1} % of a step ({ours}), {:.1} % ({theirs})\nmedians {measured}: {} and {}",
        share(of_ours),
        share(of_theirs),
        medians(of_ours),
        medians(of_theirs)
    )
}

/// The upper one of two in the middle; NaN of nothing.
fn median(times: &[StepTime], value: impl Fn(&StepTime) -> f64) -> f64 {
    let mut values: Vec<f64> = times.iter().map(value).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
