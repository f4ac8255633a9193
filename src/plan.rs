//! Host arithmetic only: the list of tensors, checked and cut into tiles.

use crate::abi::{TensorDesc, TILE_BYTES};
use crate::address_sort::{sort_by_address, Span};
use crate::dtype::Dtype;
use crate::error::{Error, Result};

/// Where one gradient lies. Non-empty ones are aligned to their dtype once [`Plan::update`] has taken them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TensorRef {
    pub address: u64,
    pub numel: u64,
    pub dtype: Dtype,
}

impl TensorRef {
    /// Of no memory: what stands for a variable without gradient.
    #[cfg(any(feature = "candle-cuda", all(feature = "tch", feature = "cuda")))]
    pub(crate) const NOTHING: Self = Self { address: 0, numel: 0, dtype: Dtype::F32 };
}

/// Tiles of a tensor: a tensor of any size starts a new one.
pub(crate) fn num_tiles(numel: u64, dtype: Dtype) -> u64 {
    numel.div_ceil((TILE_BYTES / dtype.size()) as u64)
}

/// A checked list: descriptors in the caller's order, and what launches need to know of them. Kept from call to call,
/// so that the usual list, the same as last time, costs one comparison.
#[derive(Clone, Debug, Default)]
pub(crate) struct Plan {
    descs: Vec<TensorDesc>,
    num_tiles: u32,
    has_f64: bool,
    by_address: Vec<Span>,
    scratch: Vec<Span>,
}

impl Plan {
    /// Whether the descriptors are those of these tensors.
    pub(crate) fn are(descs: &[TensorDesc], tensors: &[TensorRef]) -> bool {
        descs.len() == tensors.len()
            && descs.iter().zip(tensors).all(|(desc, tensor)| {
                desc.address == tensor.address && desc.numel == tensor.numel && desc.dtype == tensor.dtype as u32
            })
    }

    pub(crate) fn descs(&self) -> &[TensorDesc] {
        &self.descs
    }

    /// Of the tensors that are not empty, by address, of those taken by the last call. None overlaps another.
    pub(crate) fn spans(&self) -> &[Span] {
        &self.by_address
    }

    pub(crate) fn num_tiles(&self) -> u32 {
        self.num_tiles
    }

    /// Elements of all tensors.
    pub(crate) fn numel(&self) -> u64 {
        self.descs.iter().map(|desc| desc.numel).sum()
    }

    #[cfg(any(feature = "cuda", test))]
    pub(crate) fn has_f64(&self) -> bool {
        self.has_f64
    }

    /// Index of the tensor that holds `tile`.
    pub(crate) fn tensor_of(&self, tile: u64) -> Option<usize> {
        (tile < u64::from(self.num_tiles))
            .then(|| self.descs.partition_point(|desc| u64::from(desc.first_tile) <= tile) - 1)
    }

    /// Whether this plan is one of exactly these tensors.
    #[cfg(any(feature = "cuda", test))]
    pub(crate) fn is_for(&self, tensors: &[TensorRef]) -> bool {
        Self::are(&self.descs, tensors)
    }

    /// Takes a new list. On an error the plan is empty.
    ///
    /// Cost: one pass, and a sort by address for the overlap check; no allocation for lists no longer than before.
    pub(crate) fn update(&mut self, tensors: &[TensorRef]) -> Result<()> {
        self.clear();
        let result = self.fill(tensors).and_then(|()| refuse_overlaps(&mut self.by_address, &mut self.scratch));
        if result.is_err() {
            self.clear();
        }
        result
    }

    /// Takes more tensors behind those that are there; tiles and indices go on counting. On an error nothing changes.
    /// Overlaps are looked for among the new ones only.
    pub(crate) fn append(&mut self, tensors: &[TensorRef]) -> Result<()> {
        let before = self.descs.len();
        let result = self.fill(tensors).and_then(|()| refuse_overlaps(&mut self.by_address, &mut self.scratch));
        if result.is_err() {
            self.truncate(before);
        }
        result
    }

    /// Drops all tensors but the first `count`.
    pub(crate) fn truncate(&mut self, count: usize) {
        if let Some(first) = self.descs.get(count) {
            self.num_tiles = first.first_tile;
            self.descs.truncate(count);
            self.has_f64 = self.descs.iter().any(|desc| desc.dtype == Dtype::F64 as u32 && desc.numel > 0);
        }
    }

    fn clear(&mut self) {
        self.descs.clear();
        self.num_tiles = 0;
        self.has_f64 = false;
    }

    fn fill(&mut self, tensors: &[TensorRef]) -> Result<()> {
        self.by_address.clear();
        let mut next_tile = self.num_tiles;
        let first = self.descs.len();
        for (index, &TensorRef { address, numel, dtype }) in (first..).zip(tensors) {
            let too_large = || Error::TooLarge { tensor: index, numel };
            let size = numel.checked_mul(dtype.size() as u64).ok_or_else(too_large)?;
            let end = address.checked_add(size).ok_or_else(too_large)?;
            if numel > 0 && address % dtype.size() as u64 != 0 {
                return Err(Error::Misaligned { tensor: index, dtype, address });
            }
            self.descs.push(TensorDesc { address, numel, first_tile: next_tile, dtype: dtype as u32 });
            next_tile = u32::try_from(u64::from(next_tile) + num_tiles(numel, dtype))
                .ok()
                .filter(|&tiles| tiles <= i32::MAX as u32)
                .ok_or_else(too_large)?;
            if numel > 0 {
                self.has_f64 |= dtype == Dtype::F64;
                self.by_address.push((address, end, index));
            }
        }
        self.num_tiles = next_tile;
        Ok(())
    }
}

/// Of tensors that are not empty. Sorts them.
pub(crate) fn refuse_overlaps(spans: &mut Vec<Span>, scratch: &mut Vec<Span>) -> Result<()> {
    sort_by_address(spans, scratch);
    for pair in spans.windows(2) {
        let ((_, end, a), (begin, _, b)) = (pair[0], pair[1]);
        if begin < end {
            return Err(Error::Overlap { first: a.min(b), second: a.max(b) });
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn tensor(address: u64, numel: u64, dtype: Dtype) -> TensorRef {
        TensorRef { address, numel, dtype }
    }

    #[test]
    fn tiles_are_counted_in_bytes_and_never_shared() {
        let mut plan = Plan::default();
        let list = [
            tensor(0, 0, Dtype::F32),
            tensor(1 << 20, 8192, Dtype::F32),
            tensor(1 << 21, 8193, Dtype::F32),
            tensor(0, 0, Dtype::F64),
            tensor(1 << 22, 1, Dtype::BF16),
            tensor(1 << 23, 4097, Dtype::F64),
            tensor(0, 0, Dtype::F64),
        ];
        plan.update(&list).unwrap();
        let first: Vec<u32> = plan.descs().iter().map(|desc| desc.first_tile).collect();
        assert_eq!(first, [0, 0, 1, 3, 3, 4, 6]);
        assert_eq!(plan.num_tiles(), 6);
        assert!(plan.has_f64());
        let owners: Vec<_> = (0..7).map(|tile| plan.tensor_of(tile)).collect();
        assert_eq!(owners, [Some(1), Some(2), Some(2), Some(4), Some(5), Some(5), None]);
        assert!(plan.is_for(&list) && !plan.is_for(&list[1..]));
    }

    #[test]
    fn refused_lists_leave_an_empty_plan() {
        let mut plan = Plan::default();
        let refused = [
            (vec![tensor(64, 4, Dtype::F32), tensor(76, 1, Dtype::F32)], Error::Overlap { first: 0, second: 1 }),
            (
                vec![tensor(64, 1, Dtype::F16), tensor(256, 1, Dtype::F32), tensor(64, 1, Dtype::F16)],
                Error::Overlap { first: 0, second: 2 },
            ),
            (vec![tensor(66, 1, Dtype::F32)], Error::Misaligned { tensor: 0, dtype: Dtype::F32, address: 66 }),
            (vec![tensor(8, u64::MAX / 2, Dtype::F32)], Error::TooLarge { tensor: 0, numel: u64::MAX / 2 }),
            (vec![tensor(u64::MAX - 7, 2, Dtype::F64)], Error::TooLarge { tensor: 0, numel: 2 }),
            (
                vec![tensor(0, 1 << 46, Dtype::BF16), tensor(1 << 50, 1, Dtype::BF16)],
                Error::TooLarge { tensor: 0, numel: 1 << 46 },
            ),
        ];
        for (list, expected) in refused {
            assert_eq!(plan.update(&list).unwrap_err(), expected);
            assert_eq!((plan.descs().len(), plan.num_tiles()), (0, 0));
        }
        // Neighbours that touch are not overlapping, nor are empties anywhere.
        plan.update(&[tensor(64, 4, Dtype::F32), tensor(80, 4, Dtype::F32), tensor(70, 0, Dtype::F32)]).unwrap();
    }
}
