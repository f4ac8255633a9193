//! Host arithmetic only: a checked list, cut into tiles in the order of the groups that share a norm.

use crate::abi::{ScopedGroup, ScopedTensor, TensorDesc, SAME_THRESHOLD};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::fp_env::DefaultFpEnv;
use crate::plan::{num_tiles, Plan};
use crate::scope::{Kind, Scope};
use std::ops::Range;

/// The list and the groups of one scoped call. Each group owns tiles in a row; within one the tensors are in the order of
/// the list, so that the group's norm has the bits of a list of its tensors alone.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct ScopedPlan {
    pub tensors: Vec<ScopedTensor>,
    pub groups: Vec<ScopedGroup>,
    /// By index in the caller's list.
    pub groups_of: Vec<Range<usize>>,
    pub num_tiles: u32,
    pub telemetry: bool,
    made_of: Source,
}

/// What a plan was made of, to know the same call again.
#[derive(Clone, Debug, Default, PartialEq)]
struct Source {
    descs: Vec<TensorDesc>,
    groups: Option<Vec<usize>>,
    rows: Option<Vec<usize>>,
    per_tensor: bool,
    /// By their bits: the caller's floating-point environment may take a subnormal for zero.
    max_norms: Option<Vec<Option<u64>>>,
    only_measured: bool,
}

impl Source {
    fn new(descs: &[TensorDesc], scope: &Scope<'_>) -> Self {
        let mut source = Self { descs: descs.to_vec(), ..Self::default() };
        match scope.kind {
            Kind::Groups(groups) => source.groups = Some(groups.to_vec()),
            Kind::Rows(rows) => source.rows = Some(rows.to_vec()),
            Kind::PerTensor => source.per_tensor = true,
            Kind::Global | Kind::LeadingDimension => {}
        }
        source.max_norms = scope.max_norms.map(|all| all.iter().map(bits).collect());
        source.only_measured = only_measured(scope);
        source
    }

    #[cfg(any(feature = "cuda", test))]
    fn is(&self, descs: &[TensorDesc], scope: &Scope<'_>) -> bool {
        let same_kind = match scope.kind {
            Kind::Groups(groups) => self.groups.as_deref() == Some(groups),
            Kind::Rows(rows) => self.rows.as_deref() == Some(rows),
            Kind::PerTensor => self.per_tensor,
            Kind::Global => self.groups.is_none() && self.rows.is_none() && !self.per_tensor,
            Kind::LeadingDimension => false,
        };
        let same_thresholds = match (&self.max_norms, scope.max_norms) {
            (Some(own), Some(others)) => own.iter().copied().eq(others.iter().map(bits)),
            (own, others) => own.is_none() && others.is_none(),
        };
        same_kind && same_thresholds && self.only_measured == only_measured(scope) && self.descs == descs
    }
}

/// Whether there are thresholds that do not count.
fn only_measured(scope: &Scope<'_>) -> bool {
    scope.only_measured && scope.max_norms.is_some()
}

fn bits(max_norm: &Option<f64>) -> Option<u64> {
    max_norm.map(f64::to_bits)
}

impl ScopedTensor {
    /// Elements of all its rows.
    pub(crate) fn numel(&self) -> u64 {
        u64::from(self.num_tiles.checked_div(self.tiles_per_row).unwrap_or(0)) * self.row_numel
    }
}

impl ScopedPlan {
    pub(crate) fn new(plan: &Plan, scope: &Scope<'_>) -> Result<Self> {
        let descs = plan.descs();
        let mut of = Self { telemetry: scope.telemetry, made_of: Source::new(descs, scope), ..Self::default() };
        match scope.kind {
            Kind::Global => of.add_groups(descs, 1, |_| 0)?,
            Kind::PerTensor => of.add_groups(descs, descs.len(), |index| index)?,
            Kind::Groups(group_of) => {
                expect_length("groups", descs.len(), group_of.len())?;
                let groups = number_of_groups(group_of, scope.max_norms)?;
                of.add_groups(descs, groups, |index| group_of[index])?;
            }
            Kind::Rows(rows) => {
                expect_length("rows", descs.len(), rows.len())?;
                of.add_rows(descs, rows)?;
            }
            Kind::LeadingDimension => return Err(Error::ShapesUnknown),
        }
        if let Some(max_norms) = scope.max_norms {
            expect_length("max_norms", of.groups.len(), max_norms.len())?;
        }
        if let Some(max_norms) = scope.max_norms.filter(|_| !scope.only_measured) {
            let _env = DefaultFpEnv::enter(); // else a negative subnormal may pass for zero
            for (group, max_norm) in of.groups.iter_mut().zip(max_norms) {
                group.max_norm = threshold(*max_norm)?.to_bits();
            }
        }
        Ok(of)
    }

    /// Whether this plan is that of this call. A plan of nothing is that of an empty list.
    #[cfg(any(feature = "cuda", test))]
    pub(crate) fn is_for(&self, plan: &Plan, scope: &Scope<'_>) -> bool {
        self.telemetry == scope.telemetry && !self.groups.is_empty() && self.made_of.is(plan.descs(), scope)
    }

    /// Index in the list of the tensor that holds `tile`.
    pub(crate) fn tensor_of(&self, tile: u64) -> Option<usize> {
        let after = self.tensors.partition_point(|tensor| u64::from(tensor.first_tile) <= tile);
        (tile < u64::from(self.num_tiles)).then(|| self.tensors[after - 1].index as usize)
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn has_f64(&self) -> bool {
        self.tensors.iter().any(|tensor| tensor.dtype == Dtype::F64 as u32)
    }

    /// The tiles of a group, as a range of their numbers.
    pub(crate) fn tiles_of(group: &ScopedGroup) -> Range<usize> {
        group.first_tile as usize..group.first_tile as usize + group.num_tiles as usize
    }

    fn add_groups(&mut self, descs: &[TensorDesc], groups: usize, group_of: impl Fn(usize) -> usize) -> Result<()> {
        self.make_room(groups)?;
        let mut order: Vec<usize> = (0..descs.len()).collect();
        order.sort_by_key(|&index| group_of(index)); // stable
        self.groups_of.extend((0..descs.len()).map(|index| group_of(index)..group_of(index) + 1));
        let mut order = order.into_iter().peekable();
        for group in 0..groups {
            let (first_tile, mut numel) = (self.num_tiles, 0);
            while let Some(index) = order.next_if(|&index| group_of(index) == group) {
                numel += descs[index].numel;
                self.add_tensor(index, &descs[index], 1, group)?;
            }
            self.add_group(first_tile, self.num_tiles - first_tile, numel);
        }
        Ok(())
    }

    fn add_rows(&mut self, descs: &[TensorDesc], rows: &[usize]) -> Result<()> {
        for (index, (desc, &rows)) in descs.iter().zip(rows).enumerate() {
            let first_group = self.groups.len();
            let uneven = Error::UnevenRows { tensor: index, numel: desc.numel, rows };
            if desc.numel > 0 && !desc.numel.is_multiple_of(rows as u64) {
                return Err(uneven); // also if rows is 0: only 0 is a multiple of it
            }
            // An empty tensor may have any number of rows.
            let too_large = Error::TooLarge { tensor: index, numel: desc.numel };
            let end = first_group.checked_add(rows).and_then(|end| i32::try_from(end).ok()).ok_or(too_large)?;
            self.make_room(rows)?;
            self.add_tensor(index, desc, rows as u64, first_group)?;
            let added = self.tensors[self.tensors.len() - 1];
            for row in 0..end as u32 - first_group as u32 {
                self.add_group(added.first_tile + row * added.tiles_per_row, added.tiles_per_row, added.row_numel);
            }
            self.groups_of.push(first_group..self.groups.len());
        }
        Ok(())
    }

    fn add_tensor(&mut self, index: usize, desc: &TensorDesc, rows: u64, first_group: usize) -> Result<()> {
        let too_large = Error::TooLarge { tensor: index, numel: desc.numel };
        let dtype = Dtype::ALL[desc.dtype as usize];
        let row_numel = desc.numel.checked_div(rows).unwrap_or(0);
        let tiles = rows.saturating_mul(num_tiles(row_numel, dtype));
        let end = tiles.saturating_add(u64::from(self.num_tiles));
        let end = u32::try_from(end).ok().filter(|&end| end <= i32::MAX as u32).ok_or(too_large)?;
        self.tensors.push(ScopedTensor {
            address: desc.address,
            row_numel,
            first_tile: self.num_tiles,
            num_tiles: tiles as u32,
            tiles_per_row: num_tiles(row_numel, dtype) as u32,
            first_group: first_group as u32,
            dtype: desc.dtype,
            index: index as u32,
        });
        self.num_tiles = end;
        Ok(())
    }

    /// Rows that are empty, and groups that have only a threshold, can be more than memory holds.
    fn make_room(&mut self, groups: usize) -> Result<()> {
        let bytes = groups.saturating_mul(size_of::<ScopedGroup>());
        let fits = self.groups.len().checked_add(groups).is_some_and(|all| i32::try_from(all).is_ok());
        let room = fits && self.groups.try_reserve(groups).is_ok();
        room.then_some(()).ok_or(Error::OutOfMemory { what: "table of groups", bytes })
    }

    fn add_group(&mut self, first_tile: u32, num_tiles: u32, numel: u64) {
        self.groups.push(ScopedGroup { max_norm: SAME_THRESHOLD, numel, first_tile, num_tiles });
    }
}

/// Without thresholds, each group has at least one tensor or a later group has: there are not more groups than tensors.
fn number_of_groups(group_of: &[usize], max_norms: Option<&[Option<f64>]>) -> Result<usize> {
    let limit = max_norms.map_or(group_of.len(), <[_]>::len);
    if let Some((tensor, &group)) = group_of.iter().enumerate().find(|(_, &group)| group >= limit) {
        return Err(Error::NoSuchGroup { tensor, group, groups: limit });
    }
    Ok(max_norms.map_or_else(|| group_of.iter().map(|group| group + 1).max().unwrap_or(0), <[_]>::len))
}

/// Infinity only measures. -0 is 0: its sign would reach the gradients.
fn threshold(max_norm: Option<f64>) -> Result<f64> {
    let max_norm = max_norm.unwrap_or(f64::INFINITY);
    if max_norm.is_nan() || max_norm < 0.0 {
        return Err(Error::InvalidThreshold { name: "max_norm", expected: "zero or positive", got: max_norm });
    }
    Ok(max_norm.abs())
}

fn expect_length(what: &'static str, expected: usize, got: usize) -> Result<()> {
    if expected == got {
        return Ok(());
    }
    Err(Error::ScopeLength { what, expected, got })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::plan::TensorRef;

    fn plan(list: &[(u64, Dtype)]) -> Plan {
        let mut plan = Plan::default();
        let at =
            |(i, &(numel, dtype)): (usize, &(u64, Dtype))| TensorRef { address: (i as u64 + 1) << 40, numel, dtype };
        plan.update(&list.iter().enumerate().map(at).collect::<Vec<_>>()).unwrap();
        plan
    }

    fn tiles(plan: &ScopedPlan) -> Vec<(u32, u32)> {
        plan.groups.iter().map(|group| (group.first_tile, group.num_tiles)).collect()
    }

    #[test]
    fn groups_own_tiles_in_a_row_in_the_order_of_the_list() {
        let list = plan(&[(8193, Dtype::F32), (0, Dtype::F64), (1, Dtype::BF16), (4097, Dtype::F64)]);
        let scoped = ScopedPlan::new(&list, &Scope::groups(&[2, 0, 0, 2])).unwrap();
        assert_eq!(scoped.tensors.iter().map(|tensor| tensor.index).collect::<Vec<_>>(), [1, 2, 0, 3]);
        assert_eq!(tiles(&scoped), [(0, 1), (1, 0), (1, 4)]);
        assert_eq!(
            (0..6).map(|tile| scoped.tensor_of(tile)).collect::<Vec<_>>(),
            [2, 0, 0, 3, 3].map(Some).into_iter().chain([None]).collect::<Vec<_>>()
        );
        assert_eq!(scoped.groups.iter().map(|group| group.numel).collect::<Vec<_>>(), [1, 0, 8193 + 4097]);
        assert_eq!(scoped.groups_of, [2..3, 0..1, 0..1, 2..3]);
        let each = ScopedPlan::new(&list, &Scope::per_tensor()).unwrap();
        assert_eq!(tiles(&each), [(0, 2), (2, 0), (2, 1), (3, 2)]);
        assert_eq!(tiles(&ScopedPlan::new(&list, &Scope::global()).unwrap()), [(0, 5)]);
    }

    #[test]
    fn a_row_starts_a_tile() {
        let list = plan(&[(3 * 8193, Dtype::F32), (0, Dtype::F32), (4, Dtype::F16)]);
        let scoped = ScopedPlan::new(&list, &Scope::rows(&[3, 2, 4])).unwrap();
        let mut expected = vec![(0, 2), (2, 2), (4, 2), (6, 0), (6, 0)];
        expected.extend((6..10).map(|tile| (tile, 1)));
        assert_eq!(tiles(&scoped), expected);
        assert_eq!(scoped.groups_of, [0..3, 3..5, 5..9]);
        assert_eq!(scoped.tensor_of(5), Some(0));
        assert_eq!(scoped.tensor_of(6), Some(2));
    }

    #[test]
    fn what_does_not_fit_the_list_is_refused() {
        let list = plan(&[(6, Dtype::F32), (4, Dtype::F32)]);
        let refused = |scope: Scope<'_>| ScopedPlan::new(&list, &scope).unwrap_err();
        assert_eq!(refused(Scope::groups(&[0])), Error::ScopeLength { what: "groups", expected: 2, got: 1 });
        assert_eq!(refused(Scope::groups(&[0, 2])), Error::NoSuchGroup { tensor: 1, group: 2, groups: 2 });
        assert_eq!(
            refused(Scope::groups(&[0, usize::MAX])),
            Error::NoSuchGroup { tensor: 1, group: usize::MAX, groups: 2 }
        );
        assert_eq!(refused(Scope::rows(&[3, 4, 1])), Error::ScopeLength { what: "rows", expected: 2, got: 3 });
        assert_eq!(refused(Scope::rows(&[3, 3])), Error::UnevenRows { tensor: 1, numel: 4, rows: 3 });
        assert_eq!(refused(Scope::rows(&[0, 4])), Error::UnevenRows { tensor: 0, numel: 6, rows: 0 });
        assert_eq!(refused(Scope::leading_dimension()), Error::ShapesUnknown);
        let few = [Some(1.0)];
        assert_eq!(
            refused(Scope::per_tensor().max_norms(&few)),
            Error::ScopeLength { what: "max_norms", expected: 2, got: 1 }
        );
        for bad in [-1.0, f64::NAN] {
            let bad = [Some(1.0), Some(bad)];
            assert!(matches!(refused(Scope::per_tensor().max_norms(&bad)), Error::InvalidThreshold { .. }));
        }
        // Where thresholds do not count, only their number does.
        let (odd, few) = ([Some(-1.0), Some(f64::NAN)], [None]);
        let measured = ScopedPlan::new(&list, &Scope::per_tensor().max_norms(&odd).only_measured()).unwrap();
        assert_eq!(measured.groups[0].max_norm, SAME_THRESHOLD);
        let too_few = Scope::per_tensor().max_norms(&few).only_measured();
        assert_eq!(refused(too_few), Error::ScopeLength { what: "max_norms", expected: 2, got: 1 });
        let empty = plan(&[(0, Dtype::F32)]);
        let many = Scope::rows(&[usize::MAX]);
        assert!(matches!(ScopedPlan::new(&empty, &many), Err(Error::TooLarge { tensor: 0, .. })));
        let most = Scope::rows(&[i32::MAX as usize + 1]);
        assert!(matches!(ScopedPlan::new(&empty, &most), Err(Error::TooLarge { tensor: 0, .. })));
        // A group without tensors has a threshold, too.
        let three = [Some(1.0), None, Some(0.0)];
        let scoped = ScopedPlan::new(&list, &Scope::groups(&[2, 2]).max_norms(&three)).unwrap();
        assert_eq!(
            scoped.groups.iter().map(|group| f64::from_bits(group.max_norm)).collect::<Vec<_>>(),
            [1.0, f64::INFINITY, 0.0]
        );
        assert_eq!(scoped.groups.len(), 3);
    }

    #[test]
    fn the_same_call_is_known_and_no_other() {
        let list = plan(&[(6, Dtype::F32), (4, Dtype::F32)]);
        let (one, two) = ([Some(0.0), None], [Some(f64::from_bits(1)), None]);
        let scopes = [
            Scope::global(),
            Scope::per_tensor(),
            Scope::per_tensor().telemetry(),
            Scope::per_tensor().max_norms(&one),
            Scope::per_tensor().max_norms(&two),
            Scope::per_tensor().max_norms(&two).only_measured(),
            Scope::groups(&[0, 1]),
            Scope::groups(&[1, 0]),
            Scope::rows(&[2, 2]),
            Scope::rows(&[3, 2]),
        ];
        for (made, scope) in scopes.iter().enumerate() {
            let scoped = ScopedPlan::new(&list, scope).unwrap();
            for (asked, scope) in scopes.iter().enumerate() {
                assert_eq!(scoped.is_for(&list, scope), made == asked, "{made} {asked}");
            }
            assert!(!scoped.is_for(&plan(&[(6, Dtype::F32), (4, Dtype::F16)]), scope));
        }
        let measured = ScopedPlan::new(&list, &Scope::global().only_measured()).unwrap();
        assert!(measured.is_for(&list, &Scope::global()), "without thresholds there is no difference");
    }
}
