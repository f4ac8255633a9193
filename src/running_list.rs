//! The list of a running norm: gradients that are added one call after the other, step after step the same.

use crate::abi::TensorDesc;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::plan::{Plan, TensorRef};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// What has been added since the norm was begun. A step that adds what the step before added, in the same order, is
/// compared with that and nothing else: no plan is made, no overlap looked for.
#[derive(Debug, Default)]
pub(crate) struct RunningList {
    /// While `following`, of all that the step before added; else of what has been added.
    plan: Arc<Plan>,
    /// Of each tensor of the plan, whether the driver has been asked about its pointer.
    looked_up: Vec<bool>,
    /// Tensors added.
    count: usize,
    following: bool,
    /// By address: the end and the index of each tensor that is not empty. Kept while not `following`.
    spans: BTreeMap<u64, (u64, usize)>,
}

impl RunningList {
    /// Begins anew.
    pub(crate) fn restart(&mut self) {
        self.count = 0;
        self.following = true;
    }

    /// Tensors that have been added.
    #[cfg(feature = "cuda")]
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    fn first_tile_of(&self, index: usize) -> u32 {
        self.plan.descs().get(index).map_or(self.plan.num_tiles(), |desc| desc.first_tile)
    }

    /// Whether these tensors, looked up like this, are what the step before added at this place.
    pub(crate) fn expects(&self, tensors: &[TensorRef], looked_up: impl Fn(usize) -> bool) -> bool {
        let next = self.count..self.count + tensors.len();
        self.following
            && self.plan.descs().get(next.clone()).is_some_and(|descs| Plan::are(descs, tensors))
            && next.enumerate().all(|(i, index)| self.looked_up[index] == looked_up(i))
    }

    /// Adds tensors; which of all they are. On an error nothing is added. Errors count all tensors of the step.
    pub(crate) fn add(&mut self, tensors: &[TensorRef], looked_up: impl Fn(usize) -> bool) -> Result<Range<usize>> {
        let added = self.count..self.count + tensors.len();
        if !self.expects(tensors, &looked_up) {
            self.leave_the_step_before();
            let plan = Arc::make_mut(&mut self.plan);
            plan.append(tensors)?;
            let overlap = plan.spans().iter().find_map(|&(begin, end, second)| {
                let (_, &(other_end, first)) = self.spans.range(..end).next_back()?;
                (other_end > begin).then_some(Error::Overlap { first, second })
            });
            if let Some(overlap) = overlap {
                plan.truncate(self.count);
                return Err(overlap);
            }
            self.spans.extend(plan.spans().iter().map(|&(begin, end, index)| (begin, (end, index))));
            self.looked_up.extend((0..tensors.len()).map(looked_up));
        }
        self.count = added.end;
        Ok(added)
    }

    /// Takes back the last tensors added.
    #[cfg(feature = "cuda")]
    pub(crate) fn remove(&mut self, added: Range<usize>) {
        self.count = added.start;
        self.leave_the_step_before();
    }

    /// The plan of what has been added.
    pub(crate) fn plan(&mut self) -> &Arc<Plan> {
        if self.count < self.plan.descs().len() {
            self.leave_the_step_before();
        }
        &self.plan
    }

    /// Makes the plan one of what has been added, which can grow.
    fn leave_the_step_before(&mut self) {
        if !self.following && self.count == self.plan.descs().len() {
            return;
        }
        Arc::make_mut(&mut self.plan).truncate(self.count);
        self.looked_up.truncate(self.count);
        self.spans.clear();
        let span = |(index, desc): (usize, &TensorDesc)| {
            (desc.numel > 0).then(|| (desc.address, (desc.address + desc.numel * size_of(desc), index)))
        };
        self.spans.extend(self.plan.descs().iter().enumerate().filter_map(span));
        self.following = false;
    }

    /// Whether the driver has been asked about the pointer of a tensor that was added.
    #[cfg(feature = "cuda")]
    pub(crate) fn was_looked_up(&self, index: usize) -> bool {
        self.looked_up.get(index).copied().unwrap_or(false)
    }

    /// The descriptors of some of the tensors, as of a list of their own.
    #[cfg(feature = "cuda")]
    pub(crate) fn descs_alone(&self, of: Range<usize>) -> impl Iterator<Item = TensorDesc> + '_ {
        let first = self.first_tile_of(of.start);
        self.plan.descs()[of].iter().map(move |desc| TensorDesc { first_tile: desc.first_tile - first, ..*desc })
    }

    /// The tiles of some of the tensors.
    pub(crate) fn tiles(&self, of: Range<usize>) -> Range<u32> {
        self.first_tile_of(of.start)..self.first_tile_of(of.end)
    }

    /// That this list is what has been added.
    pub(crate) fn check_same(&self, tensors: &[TensorRef]) -> Result<()> {
        let added = &self.plan.descs()[..self.count];
        if Plan::are(added, tensors) {
            return Ok(());
        }
        let is =
            |desc: &TensorDesc, tensor: &TensorRef| Plan::are(std::slice::from_ref(desc), std::slice::from_ref(tensor));
        let same = added.iter().zip(tensors).take_while(|(desc, tensor)| is(desc, tensor)).count();
        let nothing = || "nothing".to_owned();
        let describe = |numel, dtype, address| format!("{numel} elements of {dtype} at {address:#x}");
        let expected = added.get(same).map_or_else(nothing, |desc| describe(desc.numel, dtype_of(desc), desc.address));
        let got = tensors.get(same).map_or_else(nothing, |tensor| describe(tensor.numel, tensor.dtype, tensor.address));
        Err(Error::OtherGradients { tensor: same, expected, got })
    }
}

fn dtype_of(desc: &TensorDesc) -> Dtype {
    Dtype::ALL[desc.dtype as usize]
}

fn size_of(desc: &TensorDesc) -> u64 {
    dtype_of(desc).size() as u64
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn tensor(address: u64, numel: u64) -> TensorRef {
        TensorRef { address, numel, dtype: Dtype::F32 }
    }

    fn add(list: &mut RunningList, tensors: &[TensorRef]) -> Result<Range<usize>> {
        list.add(tensors, |_| false)
    }

    #[test]
    fn adding_in_parts_makes_the_plan_of_the_whole() {
        let tensors = [tensor(64, 4), tensor(0, 0), tensor(1 << 20, 9000), tensor(128, 1), tensor(1 << 24, 20_000)];
        let mut whole = Plan::default();
        whole.update(&tensors).unwrap();
        let mut list = RunningList::default();
        for round in 0..3 {
            list.restart();
            for part in [&tensors[..round], &tensors[round..3], &[], &tensors[3..]] {
                let before = list.count;
                assert_eq!(add(&mut list, part).unwrap(), before..before + part.len());
            }
            assert_eq!(list.tiles(2..5), whole.descs()[2].first_tile..whole.num_tiles());
            assert_eq!(list.plan().descs(), whole.descs());
            list.check_same(&tensors).unwrap();
        }
    }

    #[test]
    fn overlaps_between_parts_are_refused_and_leave_no_trace() {
        let mut list = RunningList::default();
        list.restart();
        add(&mut list, &[tensor(64, 4), tensor(256, 4)]).unwrap();
        for (again, first) in [(tensor(64, 4), 0), (tensor(76, 1), 0), (tensor(240, 100), 1), (tensor(268, 8), 1)] {
            let error = add(&mut list, &[tensor(1024, 1), again]).unwrap_err();
            assert_eq!(error, Error::Overlap { first, second: 3 });
            list.check_same(&[tensor(64, 4), tensor(256, 4)]).unwrap();
        }
        let error = add(&mut list, &[tensor(4096, 8), tensor(4100, 1)]).unwrap_err();
        assert_eq!(error, Error::Overlap { first: 2, second: 3 });
        let error = add(&mut list, &[tensor(4098, 8)]).unwrap_err();
        assert_eq!(error, Error::Misaligned { tensor: 2, dtype: Dtype::F32, address: 4098 });
        // Neighbours that touch, and empties anywhere, do not overlap.
        add(&mut list, &[tensor(80, 44), tensor(70, 0), tensor(272, 1)]).unwrap();
    }

    #[test]
    fn a_step_that_differs_is_checked_like_the_first() {
        let mut list = RunningList::default();
        list.restart();
        add(&mut list, &[tensor(64, 4)]).unwrap();
        add(&mut list, &[tensor(256, 4)]).unwrap();
        list.restart();
        assert!(list.expects(&[tensor(64, 4)], |_| false) && !list.expects(&[tensor(64, 4)], |_| true));
        add(&mut list, &[tensor(64, 4)]).unwrap();
        assert_eq!(add(&mut list, &[tensor(72, 4)]).unwrap_err(), Error::Overlap { first: 0, second: 1 });
        add(&mut list, &[tensor(256, 8)]).unwrap(); // longer than in the step before
        assert_eq!(add(&mut list, &[tensor(272, 4)]).unwrap_err(), Error::Overlap { first: 1, second: 2 });
        // One that ends early.
        list.restart();
        add(&mut list, &[tensor(64, 4)]).unwrap();
        assert_eq!((list.plan().descs().len(), list.tiles(0..1)), (1, 0..1));
        list.check_same(&[tensor(64, 4)]).unwrap();
        let missing = list.check_same(&[]).unwrap_err().to_string();
        assert!(missing.contains("tensor 0") && missing.contains("nothing"), "{missing}");
        let other = list.check_same(&[tensor(64, 4), tensor(256, 8)]).unwrap_err();
        assert!(matches!(other, Error::OtherGradients { tensor: 1, .. }));
    }
}
