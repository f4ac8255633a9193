//! One list that fails leaves the others. A GPU that takes no more work ends the run: after an illegal address, say, every
//! call of the context returns the same error, and only the first list that it met says something.

use anyhow::Result;
use std::any::Any;
use std::panic::{catch_unwind, AssertUnwindSafe};

/// What measures, on a device that may be lost.
pub trait Device {
    /// Waits for it, and says whether it still works.
    fn is_alive(&self) -> bool;
}

/// Why there are no more rows of a list.
#[derive(Debug, PartialEq, Eq)]
pub enum Failed {
    /// The next list may do.
    List(String),
    /// No list will.
    Everything(String),
}

/// Measures one list. A panic is a fault of the bench, so nothing is measured after it.
pub fn attempt<D: Device>(device: &mut D, measure: impl FnOnce(&mut D) -> Result<()>) -> Result<(), Failed> {
    match catch_unwind(AssertUnwindSafe(|| measure(device))) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) if device.is_alive() => Err(Failed::List(format!("{error:#}"))),
        Ok(Err(error)) => Err(Failed::Everything(format!("{error:#}; the GPU takes no more work"))),
        Err(panic) => Err(Failed::Everything(format!("panicked: {}", message(panic.as_ref())))),
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without a message")
}
