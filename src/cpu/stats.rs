//! What a pass sees besides the norm. Twin of `kernels/stats.cuh`.

use super::element::CpuElement;
use crate::abi::{Stats, NO_ELEMENT};

/// Of no elements.
pub(crate) const NONE: Stats = Stats { max_abs: 0.0, zeros: 0, nonfinite: 0, first_nonfinite: NO_ELEMENT };

pub(crate) fn combine(a: Stats, b: Stats) -> Stats {
    Stats {
        max_abs: if a.max_abs > b.max_abs { a.max_abs } else { b.max_abs },
        zeros: a.zeros + b.zeros,
        nonfinite: a.nonfinite + b.nonfinite,
        first_nonfinite: a.first_nonfinite.min(b.first_nonfinite),
    }
}

/// Of one tile. `first_nonfinite` counts from its first element.
pub(crate) fn tile_stats<T: CpuElement>(tile: &[T]) -> Stats {
    let (mut largest, mut zeros, mut nonfinite) = (0, 0u32, 0u32);
    for x in tile {
        let magnitude = x.magnitude_bits();
        let finite = magnitude < T::INF_BITS;
        zeros += u32::from(magnitude == 0);
        nonfinite += u32::from(!finite);
        largest = if finite { magnitude.max(largest) } else { largest };
    }
    let place = if nonfinite > 0 { tile.iter().position(|x| x.magnitude_bits() >= T::INF_BITS) } else { None };
    Stats {
        max_abs: T::magnitude_value(largest),
        zeros: zeros.into(),
        nonfinite: nonfinite.into(),
        first_nonfinite: place.map_or(NO_ELEMENT, |place| place as u64),
    }
}
