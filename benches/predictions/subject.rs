//! The crate's calls, and single kernels of it, on one list and in the same rounds.

use super::measure::arena::Arena;
use super::measure::cases::{self, Case};
use super::measure::rounds::Subject;
use super::trials::loaded::{self, Mode};
use anyhow::Result;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timed {
    /// A limit, or a call of the crate.
    Call(Case),
    /// Launches by the bench itself, by their index.
    Launches(usize, Mode),
}

pub struct Together<'a> {
    pub arena: &'a Arena,
    pub calls: cases::Loaded<'a>,
    pub launches: loaded::Loaded<'a>,
}

impl Subject for Together<'_> {
    type Case = Timed;

    fn arena(&self) -> &Arena {
        self.arena
    }

    fn needs_restored(&self, case: Timed) -> bool {
        match case {
            Timed::Call(case) => self.calls.needs_restored(case),
            Timed::Launches(index, mode) => self.launches.needs_restored((index, mode)),
        }
    }

    fn restore(&self) -> Result<()> {
        self.calls.restore()
    }

    fn flush(&mut self) -> Result<()> {
        self.calls.flush()
    }

    fn enqueue(&mut self, case: Timed) -> Result<()> {
        match case {
            Timed::Call(case) => self.calls.enqueue(case),
            Timed::Launches(index, mode) => self.launches.enqueue((index, mode)),
        }
    }
}
